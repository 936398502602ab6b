# SPDX-License-Identifier: Apache-2.0
"""UnifiedReward-Think's rewards of a judge (CodeGoat24/UnifiedReward@ff6f520)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import thought
from fastgrpo.rewards.read.faults import MAX_ANSWER
from fastgrpo.rewards.read.tags import answer_or_all, last_answer, think_then_answer

SOURCE = "CodeGoat24/UnifiedReward@ff6f520"


@reward("unifiedreward_think/accuracy", columns=("solution",), source=SOURCE,
        truth=lambda *, solution, **columns: thought(answer_or_all(solution)))  # fmt: skip
def unified_accuracy(text: str, *, solution: str) -> float:
    """1 when the first answer (or the whole text) is exactly the solution.

    Source: CodeGoat24/UnifiedReward@ff6f520, `accuracy_reward`. "fixed": the last answer, tags of
    the solution, case and final full stops aside.
    """
    said, truth = last_answer(text).strip()[:MAX_ANSWER], answer_or_all(solution).strip()
    return float(said.lower().rstrip(".") == truth.lower().rstrip("."))


@reward("unifiedreward_think/format", source=SOURCE)
def unified_format(text: str) -> float:
    """1 when the text begins with `<think>...</think> <answer>...</answer>`.

    Source: CodeGoat24/UnifiedReward@ff6f520, `format_reward`. "upstream": anything may follow.
    "fixed": as `vlm_r1/format`.
    """
    return float(think_then_answer(text) is not None)
