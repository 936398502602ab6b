# SPDX-License-Identifier: Apache-2.0
"""Advantages of the turns of multi-turn trajectories. R rows; one row is one turn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fastgrpo.errors import InputError


def _group_baseline(
    scores: Tensor, groups: Sequence[Hashable], first: list[int], mode: str, eps: float
) -> Tensor:
    """Advantages of each row against the statistics of the rows ``first`` of its group."""
    members: dict[Hashable, list[int]] = {}
    for row in first:
        members.setdefault(groups[row], []).append(row)
    out = torch.empty_like(scores)
    for row, group in enumerate(groups):
        known = scores[members[group]]
        n = len(known)
        if n == 1:
            out[row] = scores[row] / (1.0 + eps) if mode == "mean_std" else scores[row]
        elif mode == "leave_one_out":
            out[row] = (scores[row] - known.mean()) * n / (n - 1)
        else:
            scale = known.std() + eps if mode == "mean_std" else 1.0
            out[row] = (scores[row] - known.mean()) / scale
    return out


def step_episode_advantages(
    episode_rewards: Tensor,
    step_rewards: Tensor,
    groups: Sequence[Hashable],
    trajectories: Sequence[Hashable],
    *,
    step_weight: float = 1.0,
    mode: str = "leave_one_out",
    eps: float = 1e-6,
    compat: str = "fixed",
) -> Tensor:
    """Advantages A = A_episode + step_weight A_step of every turn, (R,).

    Row i is one turn of trajectory ``trajectories[i]`` in group ``groups[i]``; ``episode_rewards``
    repeats the trajectory's reward on each of its rows. ``mode``: ``leave_one_out``
    (x - mean) n / (n - 1), ``mean`` (x - mean), ``mean_std`` (x - mean) / (std + eps). The episode
    baseline counts each trajectory once, the step baseline every turn of the group; a group with
    one entry keeps its raw score.

    ``compat="upstream"``: the released code counts only a trajectory's *first* turn in the step
    baseline too. Source: OPRL / iStar (Tongyi-ConvAI/Tongyi-Character, ``istar/core_istar.py``).
    """
    if mode not in ("leave_one_out", "mean", "mean_std"):
        raise InputError(f"mode: expected leave_one_out, mean or mean_std, got {mode!r}")
    rows = {len(episode_rewards), len(step_rewards), len(groups), len(trajectories)}
    if len(rows) != 1:
        raise InputError(f"rows: expected the same number everywhere, got {sorted(rows)}")
    seen: dict[tuple[Hashable, Hashable], int] = {}
    for row, key in enumerate(zip(groups, trajectories, strict=True)):
        seen.setdefault(key, row)
    first = list(seen.values())
    step_rows = first if compat == "upstream" else list(range(len(groups)))
    episode = _group_baseline(episode_rewards, groups, first, mode, eps)
    return episode + step_weight * _group_baseline(step_rewards, groups, step_rows, mode, eps)
