# SPDX-License-Identifier: Apache-2.0
"""A part of an image, enlarged."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from fastgrpo.rewards.geometry.frames import convert
from fastgrpo.rewards.read.boxes import ordered_box

# A cut is enlarged until its longer side has so many pixels, and never beyond this factor.
LONG_SIDE, MAX_FACTOR = 448, 8


def cut(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """The part of the image inside `box`, thousandths [x1, y1, x2, y2] of its sides, enlarged.

    ValueError for what is no box with an inside.
    """
    if not ordered_box(box):
        raise ValueError(f"box: expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2, got {box!r}")
    corners = convert(list(box), "thousandths", "image", image=image.size)
    sides = (*image.size, *image.size)
    left, top, right, bottom = (
        round(min(max(corner, 0), side)) for corner, side in zip(corners, sides, strict=True)
    )
    if left >= right or top >= bottom:
        raise ValueError(f"box: {list(box)} is narrower than a pixel of the image")
    part = image.crop((left, top, right, bottom))
    factor = min(MAX_FACTOR, max(1.0, LONG_SIDE / max(part.size)))
    size = tuple(max(1, round(side * factor)) for side in part.size)
    return part.resize(size, Image.Resampling.BICUBIC) if factor > 1 else part
