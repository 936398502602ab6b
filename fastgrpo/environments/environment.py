# SPDX-License-Identifier: Apache-2.0
"""What a rollout with tools remembers: the images at hand and the calls that were made.

An environment is one rollout's. TRL calls `reset` with the row's columns, then the public methods
that the model asks for. A call that cannot be served raises `ToolFault`, whose message TRL gives to
the model; every call, served or not, is a `Step` in `steps`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from fastgrpo.environments.tools.region import cut
from fastgrpo.images import ImageFault, load_image


class ToolFault(ValueError):
    """A call the model made that cannot be served; the message is for the model."""


class Step(NamedTuple):
    """One call: the tool's name, whether it was served, and what the environment noted of it."""

    tool: str
    ok: bool
    note: Any = None


def tool(method: Callable) -> Callable:
    """A method the model may call, counted against `max_calls` and recorded.

    It returns two things: what the model is told (text, or TRL's parts of text and images), and
    what the environment notes of the call.
    """

    @functools.wraps(method)
    def call(self: Environment, *args, **kwargs):
        if len(self.steps) >= self.max_calls:
            raise ToolFault(f"no call is left: {self.max_calls} are allowed")
        try:
            result, note = method(self, *args, **kwargs)
        except (ToolFault, TypeError) as fault:  # TypeError: arguments the tool does not take
            self.steps.append(Step(method.__name__, ok=False))
            raise ToolFault(str(fault)) from fault
        self.steps.append(Step(method.__name__, ok=True, note=note))
        return result

    return call


class Environment:
    """The images of a row and the calls made on them: `zoom`, and the tools a system adds.

    `max_calls`: calls a rollout may make. `steps`: those it made. `images`: the row's, then those
    that tools made, in the order in which the model saw them.
    """

    def __init__(self, max_calls: int = 4):
        self.max_calls = max_calls
        self.steps: list[Step] = []
        self.images: list[Image.Image | None] = []  # None: a file that breaks

    def reset(self, **row) -> None:
        """Begins a rollout on a row of the data: its `images` or `image`."""
        given = row.get("images") or row.get("image") or []
        self.images = [_opened(image) for image in (given if isinstance(given, list) else [given])]
        self.steps = []

    @tool
    def zoom(self, box: list[float], image: int) -> list:
        """
        Looks closer at a part of an image.

        Args:
            box: The part, as [x1, y1, x2, y2] in thousandths of the image's width and height.
            image: Which image, counted from 1 in the order they were shown.

        Returns:
            The part, enlarged.
        """
        try:
            part = cut(self._image(image), box)
        except ValueError as fault:
            raise ToolFault(str(fault)) from fault
        return self._see(part, f"The part {box} of image {image}."), box

    def _see(self, image: Image.Image, said: str) -> list[dict[str, Any]]:
        """A tool's answer with an image in it."""
        self.images.append(image)
        said = f"{said} It is image {len(self.images)}."
        return [{"type": "image", "image": image}, {"type": "text", "text": said}]

    def _image(self, number: int) -> Image.Image:
        if type(number) is not int or not 1 <= number <= len(self.images):
            raise ToolFault(f"image {number!r}: there are images 1 to {len(self.images)}")
        if self.images[number - 1] is None:
            raise ToolFault(f"image {number} cannot be read")
        return self.images[number - 1]


def _opened(image: Any) -> Image.Image | None:
    """None for an image that breaks: its row is set aside and not scored."""
    try:
        return load_image(image)
    except ImageFault:
        return None
