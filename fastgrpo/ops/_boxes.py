# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the box ops."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import index

import torch

from fastgrpo.errors import InputError


def as_boxes(name: str, boxes, ndim: int | None = None) -> torch.Tensor:
    """(..., 4) boxes as float32 or float64 (float64 for integers and everything not a tensor)."""
    if not isinstance(boxes, torch.Tensor):
        boxes = _as_tensor(name, boxes)
        if boxes.numel() == 0:
            boxes = boxes.reshape(0, 4)
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise InputError(f"{name}: expected real coordinates, got dtype {boxes.dtype}")
    if boxes.ndim == 0 or boxes.shape[-1] != 4 or ndim not in (None, boxes.ndim):
        shape = "(..., 4)" if ndim is None else "(number of boxes, 4)"
        raise InputError(f"{name}: expected shape {shape}, got {tuple(boxes.shape)}")
    wide = boxes.dtype == torch.float64 or not boxes.is_floating_point()
    return boxes.to(torch.float64 if wide else torch.float32)


def as_box_pair(names, a, b, ndim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two box tensors on one device, in the wider of their types."""
    a, b = as_boxes(names[0], a, ndim), as_boxes(names[1], b, ndim)
    if a.device != b.device:
        raise InputError(f"{names[1]}: expected device {a.device} of {names[0]}, got {b.device}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def as_sizes(name: str, sizes: Sequence[int] | torch.Tensor, total: int | None = None) -> list[int]:
    """Boxes per sample as a list of ints; their sum is `total` when given."""
    sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else list(sizes)
    try:
        sizes = [index(n) for n in sizes]
    except TypeError as error:
        raise InputError(f"{name}: expected whole numbers, {error}") from error
    if sizes and min(sizes) < 0:
        raise InputError(f"{name}: expected counts >= 0, got {min(sizes)}")
    if total is not None and sum(sizes) != total:
        raise InputError(f"{name}: expected counts that sum to {total}, got {sum(sizes)}")
    return sizes


def starts(sizes: Iterable[int], device: torch.device) -> torch.Tensor:
    """(B + 1,) int64: where each sample begins, and the total."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int64, device=device)


def pair_counts(a_sizes: list[int], b_sizes: list[int]) -> list[int]:
    """Pairs per sample."""
    return [n * m for n, m in zip(a_sizes, b_sizes, strict=True)]


def check_same_samples(names, a_sizes: list[int], b_sizes: list[int]) -> None:
    if len(a_sizes) != len(b_sizes):
        raise InputError(
            f"{names[1]}: expected {len(a_sizes)} samples as in {names[0]}, got {len(b_sizes)}"
        )


def _as_tensor(name: str, values) -> torch.Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{name}: expected numbers, four per box; {error}") from error
