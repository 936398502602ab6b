# SPDX-License-Identifier: Apache-2.0
"""HARMO, by its abstract and reviews: a hybrid of rule and learned score, a length penalty."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.columns import group_numbers
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.systems.vlm_r1_answers import math_reward

SOURCE = "HARMO, our own reading of the abstract"


@reward("harmo/length_penalty", columns=("acc_reward",), optional=("prompts", "completion_ids"),
        range=(-1.0, 0.0), source=SOURCE, batched=True)  # fmt: skip
def harmo_length(
    texts,
    note,
    *,
    acc_reward,
    prompts=None,
    completion_ids=None,
    max_penalty: float = 0.5,
    tau: float = 1.0,
):
    """-P_max * min(1, (L - m) / (tau m)) for completions longer than m, else 0.

    m is the mean length of the group's right completions (`acc_reward` >= 0.5); a group without a
    right one has no penalty. Lengths are tokens (`completion_ids`) or words. The reviews of HARMO
    say that the penalty needs a right sample and has P_max and tau; the shape is ours.
    """
    number = group_numbers(prompts, len(texts))
    lengths = np.array(
        [len(ids) for ids in completion_ids] if completion_ids is not None
        else [text.count(" ") + 1 for text in texts], dtype=float,
    )  # fmt: skip
    right = np.array([r is not None and r >= 0.5 for r in acc_reward], dtype=bool)
    scores = np.zeros(len(texts))
    for group in np.unique(number):
        mine = number == group
        if (mine & right).any():
            mean = max(lengths[mine & right].mean(), 1.0)
            excess = (lengths - mean) / (tau * mean)
            scores = np.where(mine, -min(max_penalty, 1.0) * np.clip(excess, 0, 1), scores)
    return scores.tolist()


@reward("harmo/hybrid", columns=("solution",), optional=("verifiable",),
        source=SOURCE)  # fmt: skip
def harmo_hybrid(
    text: str,
    *,
    solution: str,
    verifiable: bool = True,
    score: Callable[[str, str], float] | None = None,
) -> float:
    """The rule where it applies, else a learned score: math match, or `score(text, solution)`.

    `score` returns a number in [0, 1]. The hybrid is HARMO's, the rule ours.
    """
    if verifiable:
        return math_reward(text, solution=solution)
    if score is None:
        raise InputError("harmo/hybrid: rows that are not verifiable need the setting 'score'")
    return float(score(text, solution))
