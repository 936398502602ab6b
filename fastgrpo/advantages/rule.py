# SPDX-License-Identifier: Apache-2.0
"""How reward columns become advantages, as one frozen description a recipe can state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.advantages.columns import AGGREGATIONS, column_advantages
from fastgrpo.advantages.groups import keep_groups
from fastgrpo.errors import InputError


@dataclass(frozen=True)
class GroupFilter:
    """Keep groups whose mean of reward column ``column`` lies in (``low``, ``high``)."""

    column: str
    low: float
    high: float
    inclusive: bool = False


@dataclass(frozen=True)
class AdvantageRule:
    """Reward columns (B, F) to advantages (B,).

    ``aggregation``, ``scale_rewards``, ``baseline``, ``eps`` as in ``column_advantages``;
    ``clamp`` bounds |A| (Perception-R1 of PR1 uses 1). ``filters``: a group is kept when *any* of
    them keeps it (PEARL keeps a prompt whose reasoning or perception rewards still vary), all
    groups when there is none. The rows of other groups get advantage 0 and leave the loss.

    ``gate_column`` names a data column that is true on perception rows: the batch then holds
    PEARL's two rollouts of each ``question_id``, and advantages go through ``paired_gate``.
    """

    aggregation: str = "sum_then_normalize"
    scale_rewards: str = "group"
    baseline: str = "mean"
    eps: float = 1e-4
    clamp: float | None = None
    filters: tuple[GroupFilter, ...] = ()
    gate_column: str | None = None
    gate_ceiling: float = 0.5
    gate_weight: float = 0.1

    def __post_init__(self) -> None:
        for name, known in (
            ("aggregation", AGGREGATIONS),
            ("scale_rewards", ("group", "batch", "none")),
            ("baseline", ("mean", "leave_one_out")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")

    def __call__(
        self,
        rewards: Tensor,
        columns: Sequence[str],
        group_sizes: Sequence[int],
        weights: Sequence[float] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advantages (B,) and which groups are kept, (P,) bool."""
        advantages = column_advantages(
            rewards,
            group_sizes,
            weights=weights,
            aggregation=self.aggregation,
            scale_rewards=self.scale_rewards,
            baseline=self.baseline,
            eps=self.eps,
        )
        if self.clamp is not None:
            advantages = advantages.clamp(-self.clamp, self.clamp)
        kept = self.kept(rewards, columns, group_sizes)
        rows = kept.repeat_interleave(torch.as_tensor(group_sizes, device=kept.device))
        return advantages.masked_fill(~rows, 0.0), kept

    def kept(self, rewards: Tensor, columns: Sequence[str], group_sizes: Sequence[int]) -> Tensor:
        """Which groups pass the filters, (P,) bool."""
        if not self.filters:
            return torch.ones(len(group_sizes), dtype=torch.bool, device=rewards.device)
        kept = torch.zeros(len(group_sizes), dtype=torch.bool, device=rewards.device)
        for f in self.filters:
            if f.column not in columns:
                raise InputError(f"filter: no reward column {f.column!r}; there are {columns}")
            column = rewards[:, list(columns).index(f.column)]
            kept |= keep_groups(column, group_sizes, low=f.low, high=f.high, inclusive=f.inclusive)
        return kept
