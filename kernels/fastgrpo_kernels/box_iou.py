# SPDX-License-Identifier: Apache-2.0
"""All pairs of ragged samples of boxes (x1, y1, x2, y2): IoU, GIoU, DIoU, CIoU, with gradients.

A pair with an invalid box (not finite, reversed, or so large that a squared length overflows) has
the lowest value of its kind and gradient zero; an empty union, hull or diagonal counts as ratio 0.
Every value and every gradient is made by one program in a fixed order: results are bitwise
reproducible. Multiplications and additions are not fused and divisions are rounded, so that IoU is
the value PyTorch computes.

Letters: P samples, A and B boxes of a sample, BA x BB the tile of one program.
"""

import math

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch

LOWEST = {"iou": 0.0, "giou": -1.0, "diou": -1.0, "ciou": -1.5}
CONVENTIONS = ("continuous", "pixel", "vlm_r1")
LIMIT_32 = tl.constexpr(math.sqrt(torch.finfo(torch.float32).max) / 4)
LIMIT_64 = tl.constexpr(math.sqrt(torch.finfo(torch.float64).max) / 4)
TINY_32 = tl.constexpr(torch.finfo(torch.float32).tiny)
TINY_64 = tl.constexpr(torch.finfo(torch.float64).tiny)
# Fused multiply-add would make the IoU of equal boxes differ from 1.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _load_boxes(ptr, index, mask):
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
def _overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND: tl.constexpr, CONVENTION: tl.constexpr):
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
def _overlap_grad(
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
    value = _overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND, CONVENTION)
    inside = (value >= LOW) & (value <= 1.0)
    return (
        tl.where(inside, gx1, 0.0),
        tl.where(inside, gy1, 0.0),
        tl.where(inside, gx2, 0.0),
        tl.where(inside, gy2, 0.0),
    )


# Rows of one table and slices of the caller's: their alignment must not choose a variant.
_UNALIGNED = [
    *("a_ptr", "b_ptr", "dvalues_ptr", "tile_sample_ptr", "first_tile_ptr"),
    *("a_offset_ptr", "b_offset_ptr", "value_offset_ptr"),
]


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _pairwise_kernel(
    a_ptr,
    b_ptr,
    values_ptr,
    tile_sample_ptr,
    first_tile_ptr,
    a_offset_ptr,
    b_offset_ptr,
    value_offset_ptr,
    LOW: tl.constexpr,
    KIND: tl.constexpr,
    CONVENTION: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    sample = tl.load(tile_sample_ptr + tile)
    a_start, a_end = tl.load(a_offset_ptr + sample), tl.load(a_offset_ptr + sample + 1)
    b_start, b_end = tl.load(b_offset_ptr + sample), tl.load(b_offset_ptr + sample + 1)
    columns = b_end - b_start
    tile -= tl.load(first_tile_ptr + sample)
    across = tl.cdiv(columns, BB)
    i = (tile // across) * BA + tl.arange(0, BA)[:, None]
    j = (tile % across) * BB + tl.arange(0, BB)[None, :]
    in_a, in_b = a_start + i < a_end, b_start + j < b_end
    ax1, ay1, ax2, ay2, a_ok = _load_boxes(a_ptr, a_start + i, in_a)
    bx1, by1, bx2, by2, b_ok = _load_boxes(b_ptr, b_start + j, in_b)
    value = _overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND, CONVENTION)
    value = tl.where(a_ok & b_ok, tl.minimum(tl.maximum(value, LOW), 1.0), LOW)
    out = tl.load(value_offset_ptr + sample) + i * columns + j
    tl.store(values_ptr + out, value, mask=in_a & in_b)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _pairwise_grad_kernel(
    a_ptr,
    b_ptr,
    dvalues_ptr,
    da_ptr,
    tile_sample_ptr,
    first_tile_ptr,
    a_offset_ptr,
    b_offset_ptr,
    value_offset_ptr,
    LOW: tl.constexpr,
    KIND: tl.constexpr,
    CONVENTION: tl.constexpr,
    A_IS_ROW: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    sample = tl.load(tile_sample_ptr + tile)
    a_start, a_end = tl.load(a_offset_ptr + sample), tl.load(a_offset_ptr + sample + 1)
    b_start, b_end = tl.load(b_offset_ptr + sample), tl.load(b_offset_ptr + sample + 1)
    i = (tile - tl.load(first_tile_ptr + sample)) * BA + tl.arange(0, BA)[:, None]
    in_a = a_start + i < a_end
    ax1, ay1, ax2, ay2, a_ok = _load_boxes(a_ptr, a_start + i, in_a)
    start = dvalues_ptr + tl.load(value_offset_ptr + sample)
    i_step = (b_end - b_start) if A_IS_ROW else 1
    j_step = 1 if A_IS_ROW else (a_end - a_start)
    g1 = tl.zeros((BA, BB), a_ptr.dtype.element_ty)
    g2, g3, g4 = g1, g1, g1
    for first in range(0, b_end - b_start, BB):
        j = first + tl.arange(0, BB)[None, :]
        in_b = b_start + j < b_end
        bx1, by1, bx2, by2, b_ok = _load_boxes(b_ptr, b_start + j, in_b)
        dx1, dy1, dx2, dy2 = _overlap_grad(
            ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, LOW, KIND, CONVENTION
        )
        up = tl.load(start + i * i_step + j * j_step, mask=in_a & in_b, other=0.0)
        on = a_ok & b_ok & in_a & in_b
        g1 += tl.where(on, up * dx1, 0.0)
        g2 += tl.where(on, up * dy1, 0.0)
        g3 += tl.where(on, up * dx2, 0.0)
        g4 += tl.where(on, up * dy2, 0.0)
    out = da_ptr + (a_start + i) * 4
    tl.store(out, tl.sum(g1, 1, keep_dims=True), mask=in_a)
    tl.store(out + 1, tl.sum(g2, 1, keep_dims=True), mask=in_a)
    tl.store(out + 2, tl.sum(g3, 1, keep_dims=True), mask=in_a)
    tl.store(out + 3, tl.sum(g4, 1, keep_dims=True), mask=in_a)


# Two pairs per thread in the gradient, where eight would spill.
TILE = {_pairwise_kernel: (32, 32), _pairwise_grad_kernel: (8, 32)}


def _launch(kernel, tensors, a_sizes, b_sizes, tiles, kind, convention, **flags) -> None:
    """Run `kernel` once per tile; `tiles(rows, columns, BA, BB)` counts those of a sample."""
    small = max([*a_sizes, *b_sizes]) <= 8
    ba, bb = (8, 8) if small else TILE[kernel]
    na, nb = torch.tensor(a_sizes), torch.tensor(b_sizes)
    counts = tiles(na, nb, ba, bb)
    tables = [torch.nn.functional.pad(n.cumsum(0), (1, 0)) for n in (counts, na, nb)]
    value_sizes = na * nb
    tables.append(torch.nn.functional.pad(value_sizes.cumsum(0), (1, 0)))
    sample = torch.repeat_interleave(counts)
    device = tensors[0].device
    first_tile, a_offset, b_offset, value_offset = torch.stack(tables).to(device)
    launch(
        kernel,
        (len(sample),),
        tensors[0],
        *tensors,
        sample.to(device),
        first_tile,
        a_offset,
        b_offset,
        value_offset,
        LOW=LOWEST[kind],
        KIND=kind,
        CONVENTION=convention,
        **flags,
        BA=ba,
        BB=bb,
        num_warps=1 if small else 4,
        **OPTIONS,
    )


def _value_tiles(na: torch.Tensor, nb: torch.Tensor, ba: int, bb: int) -> torch.Tensor:
    return ((na + ba - 1) // ba) * ((nb + bb - 1) // bb)


def _row_tiles(na: torch.Tensor, nb: torch.Tensor, ba: int, bb: int) -> torch.Tensor:
    return (na + ba - 1) // ba


@torch.library.custom_op("fastgrpo::pairwise_box_iou_triton", mutates_args=())
def _pairwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_sizes: list[int],
    b_sizes: list[int],
    kind: str,
    convention: str,
) -> torch.Tensor:
    values = a.new_empty(_num_values(a_sizes, b_sizes))
    if len(values):
        tensors = (a.contiguous(), b.contiguous(), values)
        _launch(_pairwise_kernel, tensors, a_sizes, b_sizes, _value_tiles, kind, convention)
    return values


@torch.library.custom_op("fastgrpo::pairwise_box_iou_grad_triton", mutates_args=())
def _pairwise_grad(
    a: torch.Tensor,
    b: torch.Tensor,
    dvalues: torch.Tensor,
    a_sizes: list[int],
    b_sizes: list[int],
    kind: str,
    convention: str,
    a_is_row: bool,
) -> torch.Tensor:
    """The gradient for `a`; values are row-major in (a, b) if a_is_row, else in (b, a)."""
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    if len(a):
        tensors = (a.contiguous(), b.contiguous(), dvalues.contiguous(), da)
        kernel = _pairwise_grad_kernel
        flags = {"A_IS_ROW": a_is_row}
        _launch(kernel, tensors, a_sizes, b_sizes, _row_tiles, kind, convention, **flags)
    return da


@_pairwise.register_fake
def _(a, b, a_sizes, b_sizes, kind, convention):
    return a.new_empty(_num_values(a_sizes, b_sizes))


@_pairwise_grad.register_fake
def _(a, b, dvalues, a_sizes, b_sizes, kind, convention, a_is_row):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _num_values(a_sizes: list[int], b_sizes: list[int]) -> int:
    return sum(n * m for n, m in zip(a_sizes, b_sizes, strict=True))


def _save(ctx, inputs, output) -> None:
    a, b, *ctx.rest = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx, dvalues: torch.Tensor):
    a, b = ctx.saved_tensors
    a_sizes, b_sizes, kind, convention = ctx.rest
    da = db = None
    if ctx.needs_input_grad[0]:
        da = _pairwise_grad(a, b, dvalues, a_sizes, b_sizes, kind, convention, True)
    if ctx.needs_input_grad[1]:
        db = _pairwise_grad(b, a, dvalues, b_sizes, a_sizes, kind, convention, False)
    return da, db, None, None, None, None


_pairwise.register_autograd(_backward, setup_context=_save)


def pairwise_box_iou(
    a: torch.Tensor,
    b: torch.Tensor,
    a_sizes: list[int],
    b_sizes: list[int],
    *,
    kind: str,
    convention: str,
) -> torch.Tensor:
    """Every box of `a` with every box of `b` of the same sample, samples after one another.

    a (sum a_sizes, 4), b (sum b_sizes, 4), both float32 or both float64. Returns
    (sum a_s * b_s,), each sample's (a_s, b_s) block row-major. Differentiable in a and b.
    """
    assert a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
    return _pairwise(a, b, a_sizes, b_sizes, kind, convention)


def aot_specs() -> list[KernelSpec]:
    tables = ("tile_sample", "first_tile", "a_offset", "b_offset", "value_offset")
    pointers = {f"{name}_ptr": "*i64" for name in tables}

    def spec(kernel, kind: str, convention: str, dtype: str = "*fp32") -> KernelSpec:
        backward = kernel is _pairwise_grad_kernel
        names = ("a", "b", "dvalues", "da") if backward else ("a", "b", "values")
        ba, bb = TILE[kernel]
        constexprs = {"LOW": LOWEST[kind], "KIND": kind, "CONVENTION": convention}
        return KernelSpec(
            kernel,
            {f"{name}_ptr": dtype for name in names} | pointers,
            constexprs | {"BA": ba, "BB": bb} | ({"A_IS_ROW": True} if backward else {}),
            hot=dtype == "*fp32",
            label=f"{kind} {convention} {dtype[1:]}",
            options=OPTIONS,
        )

    forward = [spec(_pairwise_kernel, kind, "continuous") for kind in LOWEST]
    forward += [spec(_pairwise_kernel, "iou", convention) for convention in CONVENTIONS[1:]]
    forward += [spec(_pairwise_kernel, "ciou", "continuous", "*fp64")]
    return forward + [spec(_pairwise_grad_kernel, kind, "continuous") for kind in LOWEST]
