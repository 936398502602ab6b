# SPDX-License-Identifier: Apache-2.0
"""VRAG-RL's reward (Alibaba-NLP/VRAG@24f8d05): gate, judge and retrieval quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.faults import BadColumn

SOURCE = "Alibaba-NLP/VRAG@24f8d05"
MAX_RETRIEVED = 10_000


def ndcg(retrieved: Sequence[str], relevant: Sequence[str], *, repeats: bool) -> float:
    """Binary nDCG with log2(rank + 1); with `repeats` a page found twice gains twice."""
    gold = set(relevant)
    seen: set[str] = set()
    gain = 0.0
    for rank, page in enumerate(retrieved[:MAX_RETRIEVED], start=1):
        if page in gold and (repeats or page not in seen):
            gain += 1 / math.log2(rank + 1)
        seen.add(page)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, len(relevant) + 1))
    return gain / ideal if ideal else 0.0


_COLUMNS = ("retrieved", "relevant")


@reward("vrag_rl/ndcg", columns=_COLUMNS, upstream_range=(0.0, math.inf), source=SOURCE)
def ndcg_reward(text: str, *, retrieved, relevant) -> float:
    """nDCG of the retrieved pages, in order, against the relevant ones; does not read the text.

    Source: Alibaba-NLP/VRAG@24f8d05, `ndcg`. "upstream": a page retrieved twice counts twice, so
    the value can exceed 1. "fixed": once; without relevant pages None.
    """
    if not relevant:
        raise BadColumn("no relevant pages")
    return ndcg(retrieved, list(dict.fromkeys(relevant)), repeats=False)


def last_answer(text: str) -> str | None:
    """Between the last `</answer>` and the last `<answer>` before it."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


@reward("vrag_rl/total", columns=(*_COLUMNS, "solution"), optional=("question",),
        upstream_range=(0.0, math.inf), source=SOURCE)  # fmt: skip
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
    """If gate > 0: 0.7 judge + 0.1 gate + 0.2 nDCG, else the gate's value.

    `gate(text, solution)` is the rule score (default: 1 when there is an answer); `judge(question,
    answer, solution)` is 1 or 0 (default: equality without case). Source: Alibaba-NLP/VRAG@24f8d05,
    `RMManager.__call__` (the file itself does not import). Modes as `vrag_rl/ndcg`.
    """
    found = ndcg_reward(text, retrieved=retrieved, relevant=relevant)
    return gated(text, solution, question, judge, gate, found)


@reward("vrag_rl/episode", columns=("environments", "relevant", "solution"),
        optional=("question",), source=SOURCE)  # fmt: skip
def episode(
    text: str,
    *,
    environments: Any,
    relevant,
    solution: str,
    question: str = "",
    judge: Callable[[str, str, str], float] | None = None,
    gate: Callable[[str, str], float] | None = None,
) -> float:
    """`vrag_rl/total` with the pages that the rollout's environment retrieved."""
    found = ndcg_reward(text, retrieved=environments.retrieved, relevant=relevant)
    return gated(text, solution, question, judge, gate, found)


def gated(text: str, solution: str, question: str, judge, gate, found: float) -> float:
    """The total of an answer whose retrieval has nDCG `found`."""
    said = last_answer(text)
    passed = float(said is not None) if gate is None else gate(text, solution)
    if passed <= 0:
        return passed
    said = "Please Judge False" if said is None else said.strip()
    if judge is None:
        right = float(said.lower() == solution.strip().lower())
    else:
        right = judge(question, said, solution)
    return 0.7 * right + 0.1 * passed + 0.2 * found
