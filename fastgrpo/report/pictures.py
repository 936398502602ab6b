"""Images with the boxes of the solution and of a completion drawn in."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, ImageDraw

from fastgrpo.images import ImageFault, load_image
from fastgrpo.rewards.read.tags import answer, pattern

TRUTH, PREDICTED = "#1f9d55", "#e8590c"
SIDE = 160  # of a thumbnail, in pixels
MAX_BOXES, MAX_CHARS = 50, 100_000
_NUMBER = r"([-+]?[0-9]{1,6}(?:\.[0-9]{0,20})?(?:[eE][-+]?[0-9]{1,2})?)"
_BOX = r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]"


def boxes_of(value: Any) -> list[list[float]]:
    """The boxes in a completion's answer or in a solution column: four numbers, or text with
    `[x1,y1,x2,y2]`.
    """
    if value is None:
        return []
    if not isinstance(value, str):
        flat = len(value) == 4 and all(isinstance(number, (int, float)) for number in value)
        return [list(map(float, value))] if flat else []
    text = value[:MAX_CHARS]
    found = pattern(_BOX).findall(answer(text) or text)
    return [[float(number) for number in box] for box in found[:MAX_BOXES]]


def thumbnail(path: str, truth: list[list[float]], predicted: list[list[float]]) -> bytes | None:
    """PNG bytes with both kinds of box, or None when the image cannot be opened."""
    try:
        image = load_image(path)
    except ImageFault:
        return None
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
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
