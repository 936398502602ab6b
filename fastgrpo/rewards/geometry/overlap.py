"""The overlap of one pair of boxes.

One pair costs less in plain Python than the call of a batched op; lists of boxes go through
`matching`.
"""

from __future__ import annotations

from collections.abc import Sequence

Box = Sequence[float]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes; 0 when the union is empty."""
    inter, union = _inter_union(a, b)
    return inter / union if union > 0 else 0.0


def giou(a: Box, b: Box) -> float:
    """IoU - (hull - union) / hull of two xyxy boxes; the IoU alone when the hull is empty."""
    inter, union = _inter_union(a, b)
    overlap = inter / union if union > 0 else 0.0
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap - (hull - union) / hull if hull > 0 else overlap


def _inter_union(a: Box, b: Box) -> tuple[float, float]:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = width * height if width > 0 and height > 0 else 0.0
    return inter, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
