# SPDX-License-Identifier: Apache-2.0
"""Rewards that depend on the whole group of G completions: votes, and trust in a judge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.errors import InputError


def majority_answer(answers: Sequence[str | None]) -> str | None:
    """The most frequent non-empty answer; ties go to the first seen; None when all are empty."""
    counts = Counter(a for a in answers if a)
    return max(counts, key=counts.__getitem__) if counts else None


def vote_rewards(answers: Sequence[str | None], label: str | None) -> list[float]:
    """1.0 for each non-empty answer equal to ``label``, else 0.0."""
    return [float(bool(a) and a == label) for a in answers]


def majority_vote_rewards(answers: Sequence[str | None]) -> list[float]:
    """Reward agreement with the group's own majority answer."""
    return vote_rewards(answers, majority_answer(answers))


def cross_vote_rewards(
    answers_a: Sequence[str | None], answers_b: Sequence[str | None]
) -> tuple[list[float], list[float]]:
    """Reward agreement with the majority answer of the *other* phrasing of the same question.

    ``answers_a`` and ``answers_b`` are the answers to the original and to the rephrased question.
    Empty answers neither vote nor score; ties go to the first seen. Source: Co-Reward
    (tmlr-group/Co-Reward, ``co_reward.py``).
    """
    label_a, label_b = majority_answer(answers_b), majority_answer(answers_a)
    return vote_rewards(answers_a, label_a), vote_rewards(answers_b, label_b)


@dataclass(frozen=True)
class TrustRewards:
    """Rewards of one group, the thinking score that entered each, and the trust weight gamma."""

    rewards: Tensor
    thinking: Tensor
    gamma: float


def trust_weighted_rewards(
    outcome: Tensor,
    thinking: Tensor,
    *,
    step: int,
    total: int = 500,
    alpha: float = 0.3,
    compat: str = "fixed",
) -> TrustRewards:
    """Trust-GRPO: R = R_o + gamma alpha exp(-step / total) R_t for one group.

    mu_c and mu_w are the mean thinking scores of completions with outcome >= 0.5 and < 0.5;
    gamma = 1 if mu_c >= mu_w else exp(mu_c - mu_w): a judge that prefers the wrong answers is
    trusted less. An empty side counts as no evidence (gamma = 1).

    ``compat="upstream"`` adds what the released code does and the paper does not say: the thinking
    score of a completion with outcome < 0.2 is 0, the whole group's is 0 when all outcomes are
    >= 0.9 or all <= 0.1 (gamma is then logged as 0.5), an empty side has mean 0, and the *logged*
    gamma is exp(2 (mu_c - mu_w)).

    ``outcome`` and ``thinking`` are (G,). Source: SophiaVL-R1 (kxfan2002/SophiaVL-R1,
    ``verl/workers/reward/custom.py``) and its paper's Trust-GRPO equations.
    """
    if outcome.shape != thinking.shape or outcome.ndim != 1:
        raise InputError(
            f"outcome, thinking: expected two (G,) tensors, got {tuple(outcome.shape)} and "
            f"{tuple(thinking.shape)}"
        )
    outcome, thinking = outcome.double(), thinking.double()
    upstream = compat == "upstream"
    weight = alpha * math.exp(-step / total)
    if upstream and bool((outcome >= 0.9).all() or (outcome <= 0.1).all()):
        return TrustRewards(outcome.clone(), torch.zeros_like(thinking), 0.5)
    if upstream:
        thinking = torch.where(outcome >= 0.2, thinking, 0.0)
    right = outcome >= 0.5
    gap = 0.0
    if upstream or bool(right.any() and (~right).any()):
        mean_right = thinking[right].mean() if right.any() else thinking.new_zeros(())
        mean_wrong = thinking[~right].mean() if (~right).any() else thinking.new_zeros(())
        gap = min(float(mean_right - mean_wrong), 0.0)
    gamma = math.exp(gap)
    rewards = outcome + gamma * weight * thinking
    return TrustRewards(rewards, thinking, gamma**2 if upstream else gamma)
