# SPDX-License-Identifier: Apache-2.0
"""Images with the boxes of the solution and of a completion drawn in."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image, ImageDraw

from fastgrpo.images import ImageFault, load_image
from fastgrpo.rewards.geometry.frames import convert
from fastgrpo.rewards.read.boxes import bracket_boxes, other_box
from fastgrpo.rewards.read.faults import BadColumn
from fastgrpo.rewards.read.tags import answer_or_all

TRUTH, PREDICTED = "#1f9d55", "#e8590c"
SIDE = 160  # of a thumbnail, in pixels
MAX_BOXES, MAX_CHARS = 50, 100_000


def boxes_of(value: Any) -> list[list[float]]:
    """The boxes in a completion's answer or in a solution column: four numbers, or text with
    `[x1,y1,x2,y2]`.
    """
    if value is None:
        return []
    if not isinstance(value, str):
        flat = len(value) == 4 and all(isinstance(number, (int, float)) for number in value)
        return [list(map(float, value))] if flat else []
    said = answer_or_all(value[:MAX_CHARS])
    box = None if "[" in said else other_box(said)
    return bracket_boxes(said, MAX_BOXES) if box is None else [box]


def drawn_boxes(row: dict[str, Any], text: str) -> tuple[list, list]:
    """Boxes of a row's solution and of a completion, in pixels of the upright image.

    `frames` is what the recorder left: the frame of each side and the sizes of the image. Without
    it both are taken as they stand; where a size is not known, or the image is not, none is drawn.
    """
    truth, said = boxes_of(row.get("solution")), boxes_of(text)
    if "frames" not in row or row["frames"] is None:
        return truth, said
    frames = json.loads(row["frames"] or "{}")
    if not frames:
        return [], []
    sizes = {side: frames[side] and tuple(frames[side]) for side in ("image", "seen")}
    try:
        return tuple(
            [convert(box, frames[side], "image", **sizes) for box in boxes]
            for side, boxes in (("solution", truth), ("answer", said))
        )
    except BadColumn:
        return [], []


def thumbnail(
    source: Any, truth: list[list[float]], predicted: list[list[float]], side: int = SIDE
) -> bytes | None:
    """PNG bytes with both kinds of box, `side` pixels long, or None when the image cannot be
    opened."""
    try:
        image = load_image(source)
    except ImageFault:
        return None
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    for boxes, colour in ((truth, TRUTH), (predicted, PREDICTED)):
        for x1, y1, x2, y2 in boxes:
            corners = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
            left, top, right, bottom = (round(value * scale) for value in corners)
            draw.rectangle(
                (left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2
            )
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
