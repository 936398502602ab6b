# SPDX-License-Identifier: Apache-2.0
"""Gather of rows and sum of rows by owner, in plain PyTorch: the definition."""

import torch


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index]; the gradient of a row read several times is summed in float32, then rounded."""
    return x.to(_compute_dtype(x)).index_select(0, index).to(x.dtype)


def sum_rows(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """out[n] = sum of x[m] over index[m] == n, in float32, then rounded; absent rows are zero."""
    total = x.new_zeros((num_rows, *x.shape[1:]), dtype=_compute_dtype(x))
    return total.index_add(0, index, x.to(total.dtype)).to(x.dtype)
