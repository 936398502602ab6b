# SPDX-License-Identifier: Apache-2.0
"""Images with the boxes and points of the solution and of a completion drawn in."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image, ImageDraw

from fastgrpo.images import ImageFault, load_image
from fastgrpo.rewards.geometry.frames import convert
from fastgrpo.rewards.read.boxes import bracket_boxes, bracket_points, other_box
from fastgrpo.rewards.read.faults import BadColumn
from fastgrpo.rewards.read.tags import answer_or_all

TRUTH, PREDICTED = "#1f9d55", "#e8590c"
SIDE, RING = 160, 4  # of a thumbnail, and around a point, in pixels
IMAGES_SHOWN = 6  # of a row with more of them, such as the frames of a video
MAX_SHAPES, MAX_CHARS = 50, 100_000


def shapes_of(value: Any) -> list[list[float]]:
    """The boxes and points in a completion's answer or in a solution column: four or two numbers,
    or text with `[x1,y1,x2,y2]` and `[x,y]`.
    """
    if value is None:
        return []
    if not isinstance(value, str):
        flat = len(value) in (2, 4) and all(isinstance(number, (int, float)) for number in value)
        return [list(map(float, value))] if flat else []
    said = answer_or_all(value[:MAX_CHARS])
    box = None if "[" in said else other_box(said)
    if box is not None:
        return [box]
    return bracket_boxes(said, MAX_SHAPES) + bracket_points(said, MAX_SHAPES)


def drawn_shapes(row: dict[str, Any], text: str) -> tuple[list, list]:
    """Boxes and points of a row's solution and of a completion, in pixels of the upright image.

    `frames` is what the recorder left: the frame of each side and the sizes of the image. Without
    it both are taken as they stand; where a size is not known, or the image is not, none is drawn.
    """
    truth, said = shapes_of(row.get("solution")), shapes_of(text)
    if "frames" not in row or row["frames"] is None:
        return truth, said
    frames = json.loads(row["frames"] or "{}")
    if not frames:
        return [], []
    sizes = {side: frames[side] and tuple(frames[side]) for side in ("image", "seen")}
    try:
        return tuple(
            [list(convert(shape, frames[side], "image", **sizes)) for shape in shapes]
            for side, shapes in (("solution", truth), ("answer", said))
        )
    except BadColumn:
        return [], []


def images_shown(count: int, about: int) -> list[int]:
    """Which of a row's images are shown: evenly spaced ones, and the one that boxes are about."""
    if count <= IMAGES_SHOWN:
        return list(range(count))
    even = {round(i * (count - 1) / (IMAGES_SHOWN - 1)) for i in range(IMAGES_SHOWN)}
    return sorted(even | ({about} & set(range(count))))


def thumbnail(
    source: Any, truth: list[list[float]], predicted: list[list[float]], side: int = SIDE
) -> bytes | None:
    """PNG bytes with the boxes and points of both, `side` pixels long, or None when the image
    cannot be opened."""
    try:
        image = load_image(source)
    except ImageFault:
        return None
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    for shapes, colour in ((truth, TRUTH), (predicted, PREDICTED)):
        for shape in shapes:
            # What lies outside is as far away as need be: PIL walks the whole of an outline.
            near = [min(max(value * scale, -2 * RING), side + 2 * RING) for value in shape]
            _outline(draw, near, colour)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _outline(draw: ImageDraw.ImageDraw, shape: list[float], colour: str) -> None:
    """A box (4 numbers), or a ring around a point (2)."""
    if len(shape) == 2:
        x, y = map(round, shape)
        draw.ellipse((x - RING, y - RING, x + RING, y + RING), outline=colour, width=2)
        return
    x1, y1, x2, y2 = shape
    left, top, right, bottom = map(round, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    corners = (left, top, max(left, right - 1), max(top, bottom - 1))
    draw.rectangle(corners, outline=colour, width=2)
