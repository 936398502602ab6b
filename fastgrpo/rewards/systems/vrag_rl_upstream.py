# SPDX-License-Identifier: Apache-2.0
"""`vrag_rl` as published (Alibaba-NLP/VRAG@24f8d05)."""

from __future__ import annotations

from collections.abc import Callable

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.systems import vrag_rl as fixed


@published(fixed.ndcg_reward)
def ndcg_reward(text: str, *, retrieved, relevant) -> float:
    """A page retrieved twice counts twice."""
    return fixed.ndcg(retrieved, relevant, repeats=True)


@published(fixed.total)
def total(
    text: str,
    *,
    retrieved,
    relevant,
    solution: str,
    question: str = "",
    judge: Callable[[str, str, str], float] | None = None,
    gate: Callable[[str, str], float] | None = None,
) -> float:
    """The same gate over the published nDCG."""
    found = fixed.ndcg(retrieved, relevant, repeats=True)
    return fixed.gated(text, solution, question, judge, gate, found)
