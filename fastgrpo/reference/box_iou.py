# SPDX-License-Identifier: Apache-2.0
"""Overlap of boxes (x1, y1, x2, y2) in plain PyTorch: the definition, differentiable in both sides.

A box is valid when its four coordinates are finite, x1 <= x2, y1 <= y2, and none is so large that
a squared length would overflow (`coordinate_limit`). A pair with an invalid box scores as no
overlap at all, `LOWEST[kind]`, with gradient zero. Empty unions, hulls and diagonals count as
ratio 0, so a pair of points is 0 apart and overlaps by 0: no input gives NaN.
"""

import math

import torch

KINDS = ("iou", "giou", "diou", "ciou")
CONVENTIONS = ("continuous", "pixel", "vlm_r1")
# The greatest lower bound of each kind; alpha * v of CIoU stays below 1/2.
LOWEST = {"iou": 0.0, "giou": -1.0, "diou": -1.0, "ciou": -1.5}


def coordinate_limit(dtype: torch.dtype) -> float:
    """The largest |coordinate| of a valid box: hull areas and squared diagonals stay finite."""
    return math.sqrt(torch.finfo(dtype).max) / 4


def is_box(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) -> (...) bool: finite, ordered and not too large."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    small = (boxes.abs() <= coordinate_limit(boxes.dtype)).all(-1)  # False for NaN and inf
    return small & (x1 <= x2) & (y1 <= y2)


def box_iou(a: torch.Tensor, b: torch.Tensor, *, kind: str, convention: str) -> torch.Tensor:
    """IoU family of two (..., 4) tensors that broadcast, float32 or float64."""
    valid = is_box(a) & is_box(b)
    unit = a.new_tensor([0.0, 0.0, 1.0, 1.0])
    ax1, ay1, ax2, ay2 = torch.where(valid[..., None], a, unit).unbind(-1)
    bx1, by1, bx2, by2 = torch.where(valid[..., None], b, unit).unbind(-1)
    extra = 1.0 if convention == "pixel" else 0.0
    aw, ah, bw, bh = ax2 - ax1 + extra, ay2 - ay1 + extra, bx2 - bx1 + extra, by2 - by1 + extra
    left, top = torch.maximum(ax1, bx1), torch.maximum(ay1, by1)
    right, bottom = torch.minimum(ax2, bx2), torch.minimum(ay2, by2)
    if convention == "vlm_r1":
        iw, ih = right - 1 - left, bottom - 1 - top
        inter = torch.where((iw > 0) & (ih > 0), (iw + 1) * (ih + 1), 0.0)
    else:
        inter = (right - left + extra).clamp(min=0) * (bottom - top + extra).clamp(min=0)
    union = aw * ah + bw * bh - inter
    value = iou = _ratio(inter, union)
    if kind != "iou":
        hull_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1) + extra
        hull_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1) + extra
        if kind == "giou":
            hull = hull_w * hull_h
            value = iou - _ratio((hull - union).clamp(min=0), hull)  # vlm_r1: union may exceed
        else:
            dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
            value = iou - _ratio(dx * dx + dy * dy, hull_w * hull_w + hull_h * hull_h)
        if kind == "ciou":
            angle = _aspect(aw, ah) - _aspect(bw, bh)
            v = (4 / math.pi**2) * angle * angle
            alpha = _ratio(v, 1 - iou + v).detach()
            value = value - alpha * v
    return torch.where(valid, value.clamp(LOWEST[kind], 1.0), LOWEST[kind])


def pairwise_box_iou(
    a: torch.Tensor,
    b: torch.Tensor,
    a_sizes: list[int],
    b_sizes: list[int],
    *,
    kind: str,
    convention: str,
) -> torch.Tensor:
    """Every a with every b of the same sample, samples after one another, row-major."""
    a_parts, b_parts = a.split(a_sizes), b.split(b_sizes)
    blocks = [
        box_iou(x[:, None], y[None], kind=kind, convention=convention).reshape(-1)
        for x, y in zip(a_parts, b_parts, strict=True)
    ]
    return torch.cat(blocks) if blocks else a.new_empty(0)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator, 0 with gradient 0 where the denominator is not a normal number."""
    normal = denominator >= torch.finfo(denominator.dtype).tiny
    return torch.where(normal, numerator, 0.0) / torch.where(normal, denominator, 1.0)


def _aspect(w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """atan(w / h), with pi/2 for h = 0 and 0 for a point; scaled so that no gradient overflows."""
    scale = torch.maximum(w, h).detach()
    normal = scale >= torch.finfo(scale.dtype).tiny
    scale = torch.where(normal, scale, 1.0)
    return torch.atan2(torch.where(normal, w, 0.0) / scale, torch.where(normal, h, 1.0) / scale)
