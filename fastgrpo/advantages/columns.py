# SPDX-License-Identifier: Apache-2.0
"""Advantages from several reward columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.ops.group_advantages import group_advantages

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def column_advantages(
    rewards: Tensor,
    group_sizes: int | Sequence[int],
    *,
    weights: Sequence[float] | Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    scale_rewards: str = "group",
    baseline: str = "mean",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages (B,) of ``rewards`` (B, F), one column a reward function.

    ``sum_then_normalize``: A = normalise(sum_f w_f r_f), the rule of GRPO.
    ``normalize_then_sum`` (GDPO): each column is normalised in its group, then
    A = normalise_batch(sum_f w_f normalise(r_f)), so that no column drowns another.

    NaN means not scored: it is left out of the sum and of its column's statistics; a row without
    any score gets advantage 0. ``weights`` (F,) default to 1. Source: TRL's
    ``multi_objective_aggregation``.
    """
    if rewards.ndim != 2:
        raise InputError(f"rewards: expected (B, F), got {tuple(rewards.shape)}")
    if aggregation not in AGGREGATIONS:
        raise InputError(f"aggregation: expected one of {AGGREGATIONS}, got {aggregation!r}")
    if weights is None:
        weights = [1.0] * rewards.shape[1]
    w = torch.as_tensor(weights, dtype=rewards.dtype, device=rewards.device)
    if w.shape != rewards.shape[1:]:
        raise InputError(f"weights: expected ({rewards.shape[1]},), got {tuple(w.shape)}")
    unscored = rewards.isnan().all(1)
    if aggregation == "sum_then_normalize":
        total = (rewards * w).nansum(1).masked_fill(unscored, torch.nan)
        return group_advantages(
            total, group_sizes, scale_rewards=scale_rewards, baseline=baseline, eps=eps
        )
    columns = [
        group_advantages(c, group_sizes, scale_rewards="group", baseline=baseline, eps=eps)
        for c in rewards.unbind(1)
    ]
    total = (torch.stack(columns, 1) * w).sum(1).masked_fill(unscored, torch.nan)
    return group_advantages(total, len(total), scale_rewards="group", eps=eps)
