# SPDX-License-Identifier: Apache-2.0
"""Gather of rows and its adjoint, the sum of rows by owner, for packing.

Letters: N rows of the source, M entries of the index, D columns. Neither kernel uses an atomic:
the sum walks each owner's entries in index order, in float32, so equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch

TILE, WARPS = 1024, 4  # 2 KiB of bf16 in a program, enough loads in flight to reach bandwidth
ALIGNMENT = 16  # bytes of the widest load


@triton.jit
def _tile(rows, columns, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return r, cols, (r < rows)[:, None] & (cols < columns * UNIT)


# The launcher sees to it that x and out are aligned, so that only UNIT makes a variant.
@triton.jit(
    do_not_specialize=["rows", "columns", "stride_x"], do_not_specialize_on_alignment=["index_ptr"]
)
def _gather_rows_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    rows,
    columns,
    stride_x,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m, cols, inside = _tile(rows, columns, UNIT, ROWS, BLOCK)
    row = tl.load(index_ptr + m, mask=m < rows, other=0).to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * stride_x * UNIT + cols, mask=inside)
    tl.store(out_ptr + m[:, None] * columns * UNIT + cols, x, mask=inside)


@triton.jit(
    do_not_specialize=["rows", "columns", "stride_x"],
    do_not_specialize_on_alignment=["order_ptr", "first_ptr"],
)
def _sum_rows_kernel(
    x_ptr,
    order_ptr,
    first_ptr,
    out_ptr,
    rows,
    columns,
    stride_x,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n] = sum of x[order[j]] over first[n] <= j < first[n + 1]."""
    n, cols, inside = _tile(rows, columns, UNIT, ROWS, BLOCK)
    first = tl.load(first_ptr + n, mask=n < rows, other=0)
    count = tl.load(first_ptr + n + 1, mask=n < rows, other=0) - first
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in range(0, tl.max(count, 0)):
        row = tl.load(order_ptr + first + j, mask=j < count, other=0).to(tl.int64)[:, None]
        live = inside & (j < count)[:, None]
        total += tl.load(x_ptr + row * stride_x * UNIT + cols, mask=live, other=0.0)
    out = out_ptr + n[:, None] * columns * UNIT + cols
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def _block(columns: int) -> int:
    """Columns of a tile: the widest that leaves the fewest lanes beyond the last column."""
    return min((1024, 512, 256, 128, 64), key=lambda block: triton.cdiv(columns, block) * block)


def _launch(kernel, x: Tensor, indices: tuple[Tensor, ...], out: Tensor) -> None:
    """Run a kernel over the rows of `out`, with whole vectors wherever the width allows them."""
    (rows, columns), unit = out.shape, ALIGNMENT // x.element_size()
    if columns % unit:
        unit = 1
    if x.stride(1) != 1 or x.stride(0) % unit or x.data_ptr() % ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    block = _block(columns)
    launch(
        kernel,
        (triton.cdiv(rows, TILE // block), triton.cdiv(columns, block)),
        x,
        x,
        *indices,
        out,
        rows,
        columns // unit,
        x.stride(0) // unit,
        UNIT=unit,
        ROWS=TILE // block,
        BLOCK=block,
        num_warps=WARPS,
    )


@torch.library.custom_op("fastgrpo::gather_rows", mutates_args=())
def gather_rows_op(x: Tensor, index: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """x[index] for x (N, D): (M, D). order (M,) sorts the index, first (N + 1,) marks each run."""
    out = x.new_empty((len(index), x.shape[1]))
    _launch(_gather_rows_kernel, x, (index,), out)
    return out


@torch.library.custom_op("fastgrpo::sum_rows", mutates_args=())
def sum_rows_op(x: Tensor, index: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """out[n] = sum of x[m] over index[m] == n, in float32 and in index order: (N, D)."""
    out = x.new_empty((len(first) - 1, x.shape[1]))
    _launch(_sum_rows_kernel, x, (order, first), out)
    return out


@gather_rows_op.register_fake
def _(x, index, order, first):
    return x.new_empty((index.shape[0], x.shape[1]))


@sum_rows_op.register_fake
def _(x, index, order, first):
    return x.new_empty((first.shape[0] - 1, x.shape[1]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _gather_backward(ctx, dout):
    return torch.ops.fastgrpo.sum_rows(dout, *ctx.saved_tensors), None, None, None


def _sum_backward(ctx, dout):
    return torch.ops.fastgrpo.gather_rows(dout, *ctx.saved_tensors), None, None, None


gather_rows_op.register_autograd(_gather_backward, setup_context=_setup_context)
sum_rows_op.register_autograd(_sum_backward, setup_context=_setup_context)


def aot_specs() -> list[KernelSpec]:
    """Both kernels as launched, for the dtypes of training: whole vectors, and an odd width."""
    specs = []
    numbers = dict.fromkeys(("rows", "columns", "stride_x"), "i32")
    for dtype, unit in (("bf16", 8), ("fp16", 8), ("fp32", 4), ("bf16", 1)):
        common = numbers | {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
        for kernel, indices in (
            (_gather_rows_kernel, ("index_ptr",)),
            (_sum_rows_kernel, ("order_ptr", "first_ptr")),
        ):
            signature = common | dict.fromkeys(indices, "*i64")
            tile = {"UNIT": unit, "ROWS": TILE // 512, "BLOCK": 512}
            label = dtype if unit > 1 else f"{dtype} odd"
            specs.append(KernelSpec(kernel, signature, tile, num_warps=WARPS, label=label))
    return specs
