# SPDX-License-Identifier: Apache-2.0
"""All pairs of ragged samples of boxes (x1, y1, x2, y2): IoU, GIoU, DIoU, CIoU, with gradients.

Every value and every gradient is made by one program in a fixed order: results are bitwise
reproducible. Multiplications and additions are not fused and divisions are rounded, so that IoU is
the value PyTorch computes.

Letters: P samples, A and B boxes of a sample, BA x BB the tile of one program.
"""

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.box_overlap import load_boxes, overlap, overlap_grad
from fastgrpo_kernels.launch import launch

LOWEST = {"iou": 0.0, "giou": -1.0, "diou": -1.0, "ciou": -1.5}
CONVENTIONS = ("continuous", "pixel", "vlm_r1")
# Fused multiply-add would make the IoU of equal boxes differ from 1.
OPTIONS = {"enable_fp_fusion": False}


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
    ax1, ay1, ax2, ay2, a_ok = load_boxes(a_ptr, a_start + i, in_a)
    bx1, by1, bx2, by2, b_ok = load_boxes(b_ptr, b_start + j, in_b)
    value = overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, KIND, CONVENTION)
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
    ax1, ay1, ax2, ay2, a_ok = load_boxes(a_ptr, a_start + i, in_a)
    start = dvalues_ptr + tl.load(value_offset_ptr + sample)
    i_step = (b_end - b_start) if A_IS_ROW else 1
    j_step = 1 if A_IS_ROW else (a_end - a_start)
    g1 = tl.zeros((BA, BB), a_ptr.dtype.element_ty)
    g2, g3, g4 = g1, g1, g1
    for first in range(0, b_end - b_start, BB):
        j = first + tl.arange(0, BB)[None, :]
        in_b = b_start + j < b_end
        bx1, by1, bx2, by2, b_ok = load_boxes(b_ptr, b_start + j, in_b)
        dx1, dy1, dx2, dy2 = overlap_grad(
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
