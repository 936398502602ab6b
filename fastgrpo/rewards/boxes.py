"""Boxes in rewards: checks and the IoU of one pair in each published convention.

One pair costs less in plain Python than the call of a batched op; lists of boxes go through
`detection`.
"""

from __future__ import annotations

import math
from typing import Any


def finite_box(box: Any) -> bool:
    """Four finite real numbers."""
    return (
        isinstance(box, list | tuple)
        and len(box) == 4
        and all(type(v) in (int, float) and abs(v) < 1e9 and math.isfinite(v) for v in box)
    )


# Brackets looked at before a text counts as one without a box, and characters between them.
MAX_BRACKETS, MAX_BOX_CHARS = 4096, 128


def first_box(text: str) -> list[float] | None:
    """The first `[a, b, c, d]` of finite decimal numbers ("1e-05" is one), in linear time."""
    position = 0
    for _ in range(MAX_BRACKETS):
        closed = text.find("]", position)
        if closed < 0:
            return None
        opened = text.rfind("[", max(position, closed - MAX_BOX_CHARS), closed)
        if opened >= 0:
            box = _decimals(text[opened + 1 : closed])
            if box is not None:
                return box
        position = closed + 1
    return None


def _decimals(inner: str) -> list[float] | None:
    parts = inner.split(",")
    if len(parts) != 4 or inner.strip("0123456789.+-eE, \t\r\n"):
        return None
    try:
        box = [float(part) for part in parts]
    except ValueError:
        return None
    return box if all(map(math.isfinite, box)) else None


def iou_continuous(a, b) -> float:
    """Intersection over union of two xyxy boxes; 0 when the union is empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = width * height if width > 0 and height > 0 else 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def iou_vlm_r1(a, b) -> float:
    """VLM-R1's IoU: the intersection ends at x2-1, y2-1 and counts pixels with +1; areas do not.

    Raises ZeroDivisionError when both areas cancel or vanish, as the published code does.
    """
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[2], b[2]) - 1, min(a[3], b[3]) - 1
    inter = 0.0
    if left < right and top < bottom:
        inter = (right - left + 1) * (bottom - top + 1)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return float(inter) / union


def giou(a, b) -> float:
    """IoU - (hull - union) / hull of two xyxy boxes; the IoU alone when the hull is empty."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    iou = inter / union if union > 0 else 0.0
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return iou - (hull - union) / hull if hull > 0 else iou


def ordered_box(box: Any) -> bool:
    """Four finite numbers with x1 <= x2 and y1 <= y2."""
    return finite_box(box) and box[0] <= box[2] and box[1] <= box[3]
