# SPDX-License-Identifier: Apache-2.0
"""The frame a coordinate is given in, and the one conversion between frames.

    image        pixels of the upright image
    seen         pixels of the image as the processor resized it
    thousandths  0 to 1000 over each side of the image
    unit         0 to 1 over each side of the image

Two more are written y first: "thousandths_yx" (Gemma's box_2d) and "locations" (PaliGemma's
<loc0000> to <loc1023>, 1,024 over each side). A model family states the frame of its answers, a
`solution` its own; a setting or a data column of the same name overrides both:

    answer_frame    column > setting > the column `model_frame`, which the trainer hands over
    solution_frame  column > setting > "image"

An answer whose frame nobody states is taken to share the solution's, unless a vision model writes
it whose family states none ("unstated"): it is in no frame and cannot be compared. Sizes are
(width, height) of every image of the row: `image_sizes` and `seen_sizes`, which the trainer hands
over, or the data's own `image_size`, or the image itself. Where a row has several images, the
column `image_index` says which one it is about, or the question in words, or the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fastgrpo.errors import InputError
from fastgrpo.images import ImageFault, image_size
from fastgrpo.rewards.read.chat import question_text
from fastgrpo.rewards.read.faults import BadColumn
from fastgrpo.rewards.read.images import named_image
from fastgrpo.rewards.read.tags import last_answer

Size = tuple[float, float]


class _Kind(NamedTuple):
    """What the full side measures: a number, or the side of the image in one of its sizes."""

    extent: float | str
    y_first: bool = False


FRAMES = {
    "image": _Kind("image"),
    "seen": _Kind("seen"),
    "thousandths": _Kind(1000.0),
    "unit": _Kind(1.0),
    "thousandths_yx": _Kind(1000.0, y_first=True),
    "locations": _Kind(1024.0, y_first=True),
}
UNSTATED = "unstated"  # the frame of a model whose family was taught none, or none that is known
SETTINGS = ("answer_frame", "solution_frame")
COLUMNS = (
    *SETTINGS, "model_frame", "image_sizes", "seen_sizes", "image_index", "image_size",
    "images", "image", "image_path", "prompts",
)  # fmt: skip


def convert(
    values: Any, source: str, target: str, *, image: Size | None = None, seen: Size | None = None
) -> Any:
    """Boxes (..., 4), points (..., 2) or polygons (..., 2n) of frame `source` in frame `target`.

    `image`, `seen`: (width, height) of the upright image and of the image the model saw; a frame
    in pixels needs its own. A list of numbers gives a list, anything else a float64 array. Raises
    BadColumn when a size that is needed is not known.
    """
    if source == target:
        return values
    start, end = _kind(source), _kind(target)
    (from_x, from_y), (to_x, to_y) = (_extent(k.extent, image, seen) for k in (start, end))
    if isinstance(values, list) and len(values) == 4 and type(values[0]) in (int, float):
        x1, y1, x2, y2 = _swapped(values) if start.y_first else values
        # Division first, as VLM-R1 rescales: the last bit agrees with the published code.
        box = [x1 / from_x * to_x, y1 / from_y * to_y, x2 / from_x * to_x, y2 / from_y * to_y]
        return _swapped(box) if end.y_first else box
    flat = np.asarray(values, dtype=np.float64)
    pairs = flat.reshape(*flat.shape[:-1], flat.shape[-1] // 2, 2)
    pairs = pairs[..., ::-1] if start.y_first else pairs
    pairs = pairs / np.array([from_x, from_y]) * np.array([to_x, to_y])
    return (pairs[..., ::-1] if end.y_first else pairs).reshape(flat.shape)


def _swapped(box: Sequence[float]) -> list[float]:
    return [box[1], box[0], box[3], box[2]]


def _kind(frame: str) -> _Kind:
    if frame == UNSTATED:
        raise BadColumn(
            "frame: the model's family states none for its boxes and points; say which one the "
            "prompt asks for (answer_frame: a column, or a setting of the reward)"
        )
    if frame not in FRAMES:
        raise InputError(f"frame: expected one of {', '.join(FRAMES)}, got {frame!r}")
    return FRAMES[frame]


def _extent(extent: float | str, image: Size | None, seen: Size | None) -> Size:
    if not isinstance(extent, str):
        return extent, extent
    size = image if extent == "image" else seen
    if size is None:
        what = "size of the image" if extent == "image" else "size the model saw"
        raise BadColumn(f"frame {extent!r}: the {what} is not known")
    return size


class RowFrames:
    """The frames of one row's answer and solution, and the sizes of the images it may be about.

    `stated`: somebody said what the answer's frame is; otherwise it is the solution's. `text`: the
    answer, which may name one of several images.
    """

    def __init__(
        self,
        answer: str | None = None,
        solution: str = "image",
        row: dict[str, Any] | None = None,
        text: str = "",
    ):
        self.answer, self.solution, self.row = answer or solution, solution, row or {}
        self.stated, self.text = answer is not None, text

    def to_solution(self, values: Any) -> Any:
        """Boxes or points of the answer in the frame of the solution."""
        if self.answer == self.solution:
            return values
        return self._convert(values, self.answer, self.solution)

    def to_answer(self, values: Any) -> Any:
        """Boxes or points of the solution as an answer gives them."""
        if self.answer == self.solution:
            return values
        return self._convert(values, self.solution, self.answer)

    def answer_in(self, target: str, values: Any) -> Any:
        """Boxes or points of the answer in another frame."""
        return self._convert(values, self.answer, target)

    def solution_in(self, target: str, values: Any) -> Any:
        """Boxes or points of the solution in another frame."""
        return self._convert(values, self.solution, target)

    @cached_property
    def sizes(self) -> list[tuple[Size | None, Size | None]]:
        """(upright size, seen size) of the image the row names, or of each of its images."""
        return _sizes(self.row)

    @cached_property
    def about(self) -> int | None:
        """Which of the row's sizes holds: the column's, else the image that words name."""
        if len(self.sizes) == 1:
            return 0
        question = question_text(self.row.get("prompts"))
        for said in (question, last_answer(self.text), self.text):
            index = named_image(said, len(self.sizes))
            if index is not None:
                return index
        return None

    def _convert(self, values: Any, source: str, target: str) -> Any:
        if source == target:
            return values
        if UNSTATED in (source, target):
            _kind(UNSTATED)
        if self.about is None:
            self._agree(source, target)
        image, seen = self.sizes[self.about or 0]
        return convert(values, source, target, image=image, seen=seen)

    def _agree(self, source: str, target: str) -> None:
        """All images the row may be about must give one conversion."""
        corner = {
            tuple(convert([0, 0, 1, 1], source, target, image=image, seen=seen))
            for image, seen in self.sizes
        }
        if len(corner) > 1:
            raise BadColumn(
                f"frame: {len(self.sizes)} images of different sizes, and neither the row (column "
                "'image_index'), nor its question, nor the answer names one of them"
            )


SAME = RowFrames()


def row_frames(
    columns: Mapping[str, Sequence[Any]],
    size: int,
    settings: Mapping[str, Any],
    texts: Sequence[str] | None = None,
) -> list[RowFrames]:
    """The frames of each of `size` rows, from their columns, the reward's settings, the answers."""
    stated = [settings.get(name) for name in SETTINGS]
    for name in stated:
        if name is not None:
            _kind(name)
    told = (name for name in COLUMNS if name != "prompts")  # a question alone is in no frame
    if not any(stated) and not any(columns.get(name) for name in told):
        return [SAME] * size
    texts = texts or [""] * size
    return [_row(_values(columns, i), *stated, texts[i]) for i in range(size)]


def _values(columns: Mapping[str, Sequence[Any]], i: int) -> dict[str, Any]:
    return {name: columns[name][i] for name in COLUMNS if columns.get(name) is not None}


def _row(row: dict[str, Any], answer: str | None, solution: str | None, text: str) -> RowFrames:
    answer = row.get("answer_frame") or answer or row.get("model_frame")
    solution = row.get("solution_frame") or solution or "image"
    for frame in (answer or solution, solution):
        if frame != UNSTATED:
            _kind(frame)
    return RowFrames(answer, solution, row, text)


def _sizes(row: dict[str, Any]) -> list[tuple[Size | None, Size | None]]:
    own, seen = _pairs(row.get("image_size")), _pairs(row.get("seen_sizes"))
    images = _pairs(row.get("image_sizes")) or ([] if own else _read_sizes(row))
    count = max(len(images), len(seen), len(own), 1)
    images = own * count if len(own) == 1 else own or images or [None] * count
    seen = seen or [None] * count
    if len(images) != len(seen):
        raise BadColumn(f"frame: sizes of {len(images)} images, of {len(seen)} as the model saw")
    sizes = list(zip(images, seen, strict=True))
    index = row.get("image_index")
    if index is None:
        return sizes
    if not 0 <= index < len(sizes):
        raise BadColumn(f"image_index: {index} of {len(sizes)} images")
    return [sizes[index]]


def _pairs(sizes: Any) -> list[Size | None]:
    """[(width, height), ...] of one size or a list of sizes."""
    if sizes is None or not len(sizes):
        return []
    if len(sizes) == 2 and all(isinstance(v, int | float) for v in sizes):
        return [(sizes[0], sizes[1])]
    return [None if size is None else (size[0], size[1]) for size in sizes]


def _read_sizes(row: dict[str, Any]) -> list[Size | None]:
    """Upright sizes of the row's images, whichever column holds them."""
    images = row.get("images") or row.get("image") or row.get("image_path") or ()
    images = images if isinstance(images, list | tuple) else [images]
    return [_upright_size(image) for image in images]


def _upright_size(image: Any) -> Size | None:
    try:
        return None if image is None else image_size(image)
    except ImageFault:
        return None
