# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of this package and of code built on it."""

import torch


def assert_within_budget(
    ours: torch.Tensor,
    ref64: torch.Tensor,
    same_dtype: torch.Tensor,
    *,
    factor: float = 2.0,
    what: str = "result",
) -> None:
    """Assert that `ours` is finite where float64 is, and at most `factor` times worse than PyTorch.

        max|ours - ref64| <= factor * (max|same_dtype - ref64| + eps * max|ref64|)

    ours, same_dtype: results of the op and of plain PyTorch in the same dtype. ref64: the float64
    oracle on the same inputs. eps: the machine epsilon of `ours.dtype`.
    """
    assert ours.shape == ref64.shape, f"{what}: shape {tuple(ours.shape)} != {tuple(ref64.shape)}"
    if ours.numel() == 0:
        return
    finite = ref64.isfinite()
    same = ours.double()[~finite], ref64.double()[~finite]
    torch.testing.assert_close(*same, equal_nan=True, msg=lambda m: f"{what}, non-finite: {m}")
    assert bool(ours.isfinite()[finite].all()), f"{what}: not finite where float64 is"
    if not bool(finite.any()):
        return
    ref = ref64.double()[finite]
    error = (ours.double()[finite] - ref).abs().max().item()
    base = (same_dtype.double()[finite] - ref).abs().nan_to_num(0.0, posinf=0.0).max().item()
    scale = ref.abs().max().item()
    eps = torch.finfo(ours.dtype).eps
    budget = factor * (base + eps * scale)
    assert error <= budget, (
        f"{what}: error {error:.3e} > budget {budget:.3e} "
        f"(PyTorch in {same_dtype.dtype}: {base:.3e}, eps {eps:.1e} * max|ref| {scale:.3e})"
    )


def relative_error(ours: torch.Tensor, ref: torch.Tensor) -> float:
    """|ours - ref| / |ref| in the Euclidean norm, in float64; 0 for two zero tensors."""
    difference = (ours.double() - ref.double()).norm().item()
    scale = ref.double().norm().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
