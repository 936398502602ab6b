# SPDX-License-Identifier: Apache-2.0
"""Advantages gated between groups, and which groups are kept. B completions, P prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def paired_gate(
    advantages: Tensor,
    rewards: Tensor,
    questions: Sequence,
    is_gate: Sequence[bool],
    *,
    ceiling: float = 0.5,
    gate_weight: float = 0.1,
) -> Tensor:
    """PEARL's objective J(A_r) + ``gate_weight`` J(A_p) for a batch that holds both rollouts.

    Row i answers question ``questions[i]``; where ``is_gate[i]`` it answers the question's
    perception checklist with reward R_p = ``rewards[i]``. Reasoning advantages are scaled by
    min(mean R_p, ``ceiling``), 0 where that mean is 0; perception advantages by ``gate_weight``.
    A question without scored perception rows keeps its advantages. (B,).
    """
    scored: dict[object, list[float]] = {}
    for question, gate, reward in zip(questions, is_gate, rewards.tolist(), strict=True):
        if gate and not math.isnan(reward):
            scored.setdefault(question, []).append(reward)
    means = {q: min(sum(r) / len(r), ceiling) for q, r in scored.items()}
    factors = [
        gate_weight if gate else means.get(question, 1.0)
        for question, gate in zip(questions, is_gate, strict=True)
    ]
    return advantages * torch.tensor(factors, dtype=advantages.dtype, device=advantages.device)


def keep_groups(
    rewards: Tensor, group_sizes: Sequence[int], *, low: float, high: float, inclusive: bool = False
) -> Tensor:
    """Online filtering: (P,) bool, True where the group's mean reward lies in (``low``, ``high``).

    DAPO, PAPO and VPPO keep groups with mean accuracy in (0.01, 0.99). ``inclusive`` keeps the
    ends too. NaN rewards are left out of the mean; a group without a reward is dropped.
    """
    means = torch.stack([g.nanmean() for g in rewards.split(list(group_sizes))])
    inside = (means >= low) & (means <= high) if inclusive else (means > low) & (means < high)
    return inside & ~means.isnan()
