"""Gather of rows and its adjoint, the sum of rows by owner, for packing.

Letters: N rows of the source, M entries of the index, D columns. Neither kernel uses an atomic:
the sum walks each owner's entries in index order, in float32, so equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.aot import KernelSpec

COLUMNS = 1024  # columns of one program: 2 KiB of bf16, enough loads in flight to reach bandwidth
WARPS = 4


@triton.jit(do_not_specialize=["columns", "stride_x"])
def _gather_rows_kernel(x_ptr, index_ptr, out_ptr, columns, stride_x, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index_ptr + m).to(tl.int64)
    x = tl.load(x_ptr + row * stride_x + cols, mask=cols < columns)
    tl.store(out_ptr + m * columns + cols, x, mask=cols < columns)


@triton.jit(do_not_specialize=["columns", "stride_x"])
def _sum_rows_kernel(x_ptr, order_ptr, first_ptr, out_ptr, columns, stride_x, BLOCK: tl.constexpr):
    """out[n] = sum of x[order[j]] over first[n] <= j < first[n + 1]."""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(tl.load(first_ptr + n), tl.load(first_ptr + n + 1)):
        row = tl.load(order_ptr + j).to(tl.int64)
        total += tl.load(x_ptr + row * stride_x + cols, mask=cols < columns, other=0.0)
    tl.store(out_ptr + n * columns + cols, total.to(out_ptr.dtype.element_ty), mask=cols < columns)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return rows, triton.cdiv(columns, COLUMNS)


@torch.library.custom_op("fastgrpo::gather_rows", mutates_args=())
def gather_rows_op(x: Tensor, index: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """x[index] for x (N, D): (M, D). order (M,) sorts the index, first (N + 1,) marks each run."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty((len(index), x.shape[1]))
    if out.numel():
        _gather_rows_kernel[_grid(*out.shape)](
            x, index, out, x.shape[1], x.stride(0), COLUMNS, num_warps=WARPS
        )
    return out


@torch.library.custom_op("fastgrpo::sum_rows", mutates_args=())
def sum_rows_op(x: Tensor, index: Tensor, order: Tensor, first: Tensor) -> Tensor:
    """out[n] = sum of x[m] over index[m] == n, in float32 and in index order: (N, D)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty((len(first) - 1, x.shape[1]))
    if out.numel():
        _sum_rows_kernel[_grid(*out.shape)](
            x, order, first, out, x.shape[1], x.stride(0), COLUMNS, num_warps=WARPS
        )
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
    """Both kernels as launched, for the dtypes of training."""
    specs = []
    for dtype in ("bf16", "fp16", "fp32"):
        common = {"columns": "i32", "stride_x": "i32", "x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
        for kernel, indices in (
            (_gather_rows_kernel, ("index_ptr",)),
            (_sum_rows_kernel, ("order_ptr", "first_ptr")),
        ):
            signature = common | dict.fromkeys(indices, "*i64")
            specs.append(
                KernelSpec(kernel, signature, {"BLOCK": COLUMNS}, num_warps=WARPS, label=dtype)
            )
    return specs
