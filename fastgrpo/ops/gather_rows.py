# SPDX-License-Identifier: Apache-2.0
"""gather_rows and sum_rows: ragged gather of rows and its adjoint, with float32 sums.

Letters: N rows of the source, M entries of the index; trailing dimensions are free.
"""

from typing import NamedTuple

import torch

from fastgrpo.checks import check_tensor
from fastgrpo.errors import InputError
from fastgrpo.ops.select import select
from fastgrpo.reference import gather_rows as reference


class RowIndex(NamedTuple):
    """An index checked and sorted once, to be used by many calls (every layer of a model).

    index (M,) int64; order (M,) int64 sorts it stably; first (N + 1,) int64: the entries that
    read row n are order[first[n]:first[n + 1]].
    """

    index: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor


def row_index(index: torch.Tensor, num_rows: int) -> RowIndex:
    """`index` (M,) of ids in [0, num_rows), ready for gather_rows and sum_rows.

    Raises InputError naming the first entry out of range; reads the index on the host to know.
    """
    check_tensor("index", index, "M", dtypes=(torch.int64, torch.int32))
    bad = (index < 0) | (index >= num_rows)
    if bool(bad.any()):
        entry = int(bad.nonzero()[0, 0])
        raise InputError(
            f"index: entry {entry} is {int(index[entry])}, expected a row in [0, {num_rows})"
        )
    index = index.long().contiguous()
    ordered, order = torch.sort(index, stable=True)
    first = torch.searchsorted(ordered, torch.arange(num_rows + 1, device=index.device))
    return RowIndex(index, order, first)


def gather_rows(x: torch.Tensor, rows: RowIndex, *, impl: str | None = None) -> torch.Tensor:
    """x[rows.index]: (M, ...) from x (N, ...), any floating dtype.

    Differentiable; the gradient of a row read several times is summed in float32 in index order
    (PyTorch's own backward sums in x's dtype, in no fixed order on CUDA). impl "triton", "torch"
    (deterministic both) or "reference". Raises InputError.
    """
    _check(x, rows, len(rows.first) - 1, "rows.first's")
    impl = _choose(x, impl)
    if impl == "reference":
        return reference.gather_rows(x, rows.index)
    flat = x.flatten(1)
    if impl == "torch":
        out = _Gather.apply(flat, *rows)
    else:
        from fastgrpo_kernels.gather_rows import gather_rows_op

        out = gather_rows_op(flat, *rows)
    return out.view(len(rows.index), *x.shape[1:])


def sum_rows(x: torch.Tensor, rows: RowIndex, *, impl: str | None = None) -> torch.Tensor:
    """out[n] = sum of x[m] over rows.index[m] == n: (N, ...) from x (M, ...), zero where none.

    The adjoint of gather_rows; sums in float32 in index order. Differentiable. impl as there.
    """
    _check(x, rows, len(rows.index), "rows.index's")
    impl = _choose(x, impl)
    num_rows = len(rows.first) - 1
    if impl == "reference":
        return reference.sum_rows(x, rows.index, num_rows)
    flat = x.flatten(1)
    if impl == "torch":
        out = _Sum.apply(flat, *rows)
    else:
        from fastgrpo_kernels.gather_rows import sum_rows_op

        out = sum_rows_op(flat, *rows)
    return out.view(num_rows, *x.shape[1:])


def _check(x: torch.Tensor, rows: RowIndex, length: int, of: str) -> None:
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or not x.is_floating_point():
        raise InputError("x: expected a floating tensor with a first dimension of rows and others")
    if len(x) != length:
        raise InputError(f"x: expected {length} rows ({of}), got {len(x)}")
    if rows.index.device != x.device:
        raise InputError(f"rows: expected device {x.device}, got {rows.index.device}")


def _choose(x: torch.Tensor, impl: str | None) -> str:
    wide = x.dtype == torch.float64
    impl = select("gather_rows", x.device, "torch" if impl is None and wide else impl)
    if impl == "triton" and wide:
        raise InputError("impl: the triton kernel sums in float32, ask for impl='torch' in float64")
    return impl


def _segment_sum(x: torch.Tensor, index: torch.Tensor, order: torch.Tensor, first: torch.Tensor):
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type == "cpu":  # one thread, in index order
        total = x.new_zeros((len(first) - 1, x.shape[1]), dtype=compute)
        return total.index_add_(0, index, x.to(compute)).to(x.dtype)
    ordered = x.index_select(0, order).to(compute)
    return torch.segment_reduce(ordered, "sum", offsets=first, initial=0.0).to(x.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, order, first):
        ctx.save_for_backward(index, order, first)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dout):
        index, order, first = ctx.saved_tensors
        return _Sum.apply(dout, index, order, first), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, order, first):
        ctx.save_for_backward(index, order, first)
        return _segment_sum(x, index, order, first)

    @staticmethod
    def backward(ctx, dout):
        index, order, first = ctx.saved_tensors
        return _Gather.apply(dout, index, order, first), None, None, None
