# SPDX-License-Identifier: Apache-2.0
"""`unifiedreward_think` as published (CodeGoat24/UnifiedReward@ff6f520)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read.tags import SPACE, answer_or_all, pattern
from fastgrpo.rewards.systems import unifiedreward_think as fixed


@published(fixed.unified_accuracy)
def unified_accuracy(text: str, *, solution: str) -> float:
    """Of the first answer, character for character."""
    return float(answer_or_all(text).strip() == solution)


@published(fixed.unified_format)
def unified_format(text: str) -> float:
    """Anything may follow the answer."""
    start = rf"<think>.*?</think>{SPACE}*<answer>.*?</answer>"
    return float(text.startswith("<think>") and pattern(start).match(text) is not None)
