# SPDX-License-Identifier: Apache-2.0
"""The overlap of two boxes (x1, y1, x2, y2) and its gradient: what the kernels of box_iou evaluate.

A pair with an invalid box (not finite, reversed, or so large that a squared length overflows) has
the lowest value of its kind and gradient zero; an empty union, hull or diagonal counts as ratio 0.
"""

import math

import torch
import triton
import triton.language as tl

LIMIT_32 = tl.constexpr(math.sqrt(torch.finfo(torch.float32).max) / 4)
LIMIT_64 = tl.constexpr(math.sqrt(torch.finfo(torch.float64).max) / 4)
TINY_32 = tl.constexpr(torch.finfo(torch.float32).tiny)
TINY_64 = tl.constexpr(torch.finfo(torch.float64).tiny)


@triton.jit
def load_boxes(ptr, index, mask):
    """Coordinates of boxes; an invalid box becomes the unit square with its flag off."""
    LIMIT: tl.constexpr = LIMIT_64 if ptr.dtype.element_ty == tl.float64 else LIMIT_32
    x1 = tl.load(ptr + index * 4, mask=mask, other=0.0)
    y1 = tl.load(ptr + index * 4 + 1, mask=mask, other=0.0)
    x2 = tl.load(ptr + index * 4 + 2, mask=mask, other=0.0)
    y2 = tl.load(ptr + index * 4 + 3, mask=mask, other=0.0)
    small = (tl.abs(x1) <= LIMIT) & (tl.abs(y1) <= LIMIT)
    small = small & (tl.abs(x2) <= LIMIT) & (tl.abs(y2) <= LIMIT)  # False for NaN and inf
    valid = small & (x1 <= x2) & (y1 <= y2)
    x1, y1 = tl.where(valid, x1, 0.0), tl.where(valid, y1, 0.0)
    x2, y2 = tl.where(valid, x2, 1.0), tl.where(valid, y2, 1.0)
    return x1, y1, x2, y2, valid


@triton.jit
def _ratio(numerator, denominator):
    """numerator / denominator, 0 where the denominator is not a normal number."""
    TINY: tl.constexpr = TINY_64 if denominator.dtype == tl.float64 else TINY_32
    normal = denominator >= TINY
    top, bottom = tl.where(normal, numerator, 0.0), tl.where(normal, denominator, 1.0)
    if denominator.dtype == tl.float64:
        return top / bottom
    else:
        return tl.div_rn(top, bottom)


@triton.jit
def _aspect(w, h):
    """atan(w / h) for w, h >= 0: pi/2 for h = 0, 0 for a point."""
    wide = w > h
    t = _ratio(tl.where(wide, h, w), tl.where(wide, w, h))  # in [0, 1]
    high = t > 0.41421356
    u = tl.where(high, (t - 1.0) / (t + 1.0), t)  # |u| <= tan(pi / 8): nine terms reach 3e-9
    s = u * u
    p = s * (1 / 13 + s * (-1 / 15 + s * (1 / 17)))
    p = s * (-1 / 7 + s * (1 / 9 + s * (-1 / 11) + s * p))
    p = s * (-1 / 3 + s * (1 / 5) + s * p)
    angle = u + u * p + tl.where(high, 0.7853981633974483, 0.0)
    if w.dtype == tl.float64:
        # One step of Newton's method squares the error away: tan(x - angle), by the addition rule.
        c, d = tl.cos(angle), tl.sin(angle)
        angle += (t * c - d) / (c + t * d)
    return tl.where(wide & (w > 0), 1.5707963267948966 - angle, angle)


@triton.jit
def _intersection(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, CONVENTION: tl.constexpr):
    """Width and height of the intersection, and where each passes a gradient on."""
    w = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
    h = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
    if CONVENTION == "vlm_r1":
        # Ends one pixel early, then counts the pixel back where anything is left.
        w = tl.minimum(ax2, bx2) - 1.0 - tl.maximum(ax1, bx1)
        h = tl.minimum(ay2, by2) - 1.0 - tl.maximum(ay1, by1)
        w_on = (w > 0) & (h > 0)
        h_on = w_on
        w, h = w + 1.0, h + 1.0
    else:
        if CONVENTION == "pixel":
            w, h = w + 1.0, h + 1.0
        w_on = w >= 0
        h_on = h >= 0
    return tl.where(w_on, w, 0.0), tl.where(h_on, h, 0.0), w_on, h_on


@triton.jit
def overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND: tl.constexpr, CONVENTION: tl.constexpr):
    """The value of each pair before it is clamped to its range."""
    extra: tl.constexpr = 1.0 if CONVENTION == "pixel" else 0.0
    aw, ah, bw, bh = ax2 - ax1 + extra, ay2 - ay1 + extra, bx2 - bx1 + extra, by2 - by1 + extra
    iw, ih, _, _ = _intersection(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, CONVENTION)
    inter = iw * ih
    union = aw * ah + bw * bh - inter
    iou = _ratio(inter, union)
    value = iou
    if KIND != "iou":
        hull_w = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1) + extra
        hull_h = tl.maximum(ay2, by2) - tl.minimum(ay1, by1) + extra
        if KIND == "giou":
            hull = hull_w * hull_h
            value = iou - _ratio(tl.maximum(hull - union, 0.0), hull)  # vlm_r1: may be below 0
        else:
            dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
            value = iou - _ratio(dx * dx + dy * dy, hull_w * hull_w + hull_h * hull_h)
        if KIND == "ciou":
            angle = _aspect(aw, ah) - _aspect(bw, bh)
            v = 0.4052847345693511 * angle * angle  # 4 / pi^2
            value = value - _ratio(v, 1 - iou + v) * v
    return value


@triton.jit
def overlap_grad(
    ax1,
    ay1,
    ax2,
    ay2,
    bx1,
    by1,
    bx2,
    by2,
    LOW: tl.constexpr,
    KIND: tl.constexpr,
    CONVENTION: tl.constexpr,
):
    """d value / d (ax1, ay1, ax2, ay2) of each pair; a tie of two coordinates shares its gradient.

    Values are symmetric in a and b, so the gradient for b is this one with the roles exchanged.
    """
    extra: tl.constexpr = 1.0 if CONVENTION == "pixel" else 0.0
    aw, ah, bw, bh = ax2 - ax1 + extra, ay2 - ay1 + extra, bx2 - bx1 + extra, by2 - by1 + extra
    iw, ih, w_on, h_on = _intersection(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, CONVENTION)
    # Share of a in each inner edge; its share in the hull's edge is what remains.
    left = tl.where(ax1 > bx1, 1.0, tl.where(ax1 == bx1, 0.5, 0.0))
    top = tl.where(ay1 > by1, 1.0, tl.where(ay1 == by1, 0.5, 0.0))
    right = tl.where(ax2 < bx2, 1.0, tl.where(ax2 == bx2, 0.5, 0.0))
    bottom = tl.where(ay2 < by2, 1.0, tl.where(ay2 == by2, 0.5, 0.0))

    inter = iw * ih
    di_w, di_h = tl.where(w_on, ih, 0.0), tl.where(h_on, iw, 0.0)
    ix1, iy1, ix2, iy2 = -left * di_w, -top * di_h, right * di_w, bottom * di_h
    ux1, uy1, ux2, uy2 = -ah - ix1, -aw - iy1, ah - ix2, aw - iy2
    union = aw * ah + bw * bh - inter
    iou = _ratio(inter, union)
    gx1, gy1 = _ratio(ix1 - iou * ux1, union), _ratio(iy1 - iou * uy1, union)
    gx2, gy2 = _ratio(ix2 - iou * ux2, union), _ratio(iy2 - iou * uy2, union)
    if KIND != "iou":
        hull_w = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1) + extra
        hull_h = tl.maximum(ay2, by2) - tl.minimum(ay1, by1) + extra
        hx1, hy1, hx2, hy2 = left - 1.0, top - 1.0, 1.0 - right, 1.0 - bottom
        if KIND == "giou":
            hull = hull_w * hull_h
            # 1 - penalty = union / hull, so the gradient needs no difference of areas.
            keep = _ratio(union, hull)
            on = hull >= union
            gx1 += tl.where(on, _ratio(ux1 - keep * hx1 * hull_h, hull), 0.0)
            gy1 += tl.where(on, _ratio(uy1 - keep * hy1 * hull_w, hull), 0.0)
            gx2 += tl.where(on, _ratio(ux2 - keep * hx2 * hull_h, hull), 0.0)
            gy2 += tl.where(on, _ratio(uy2 - keep * hy2 * hull_w, hull), 0.0)
        else:
            dx, dy = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
            diagonal = hull_w * hull_w + hull_h * hull_h
            far = _ratio(dx * dx + dy * dy, diagonal)
            gx1 -= _ratio(dx - far * 2 * hull_w * hx1, diagonal)
            gy1 -= _ratio(dy - far * 2 * hull_h * hy1, diagonal)
            gx2 -= _ratio(dx - far * 2 * hull_w * hx2, diagonal)
            gy2 -= _ratio(dy - far * 2 * hull_h * hy2, diagonal)
        if KIND == "ciou":
            angle = _aspect(aw, ah) - _aspect(bw, bh)
            v = 0.4052847345693511 * angle * angle
            alpha = _ratio(v, 1 - iou + v)  # a constant in the gradient, as the method defines it
            scale = tl.maximum(aw, ah)
            w, h = _ratio(aw, scale), _ratio(ah, scale)
            turn = _ratio(-alpha * 0.8105694691387022 * angle, scale * (w * w + h * h))
            gx1 -= turn * h
            gx2 += turn * h
            gy1 += turn * w
            gy2 -= turn * w
    value = overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND, CONVENTION)
    inside = (value >= LOW) & (value <= 1.0)
    return (
        tl.where(inside, gx1, 0.0),
        tl.where(inside, gy1, 0.0),
        tl.where(inside, gx2, 0.0),
        tl.where(inside, gy2, 0.0),
    )
