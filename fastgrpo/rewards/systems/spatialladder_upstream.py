# SPDX-License-Identifier: Apache-2.0
"""`spatialladder` as published (ZJU-REAL/SpatialLadder@87320be)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read.tags import think_answer
from fastgrpo.rewards.read.words import clean_text
from fastgrpo.rewards.systems import spatialladder as fixed


@published(fixed.accuracy)
def accuracy(text: str, *, answer: str, accu_reward_method: str = "mca") -> float:
    """Choices as cleaned text; numbers relative to the truth, whatever its sign."""
    said, truth = clean_text(text), clean_text(str(answer))
    if accu_reward_method == "mca":
        return float(said == truth)
    if accu_reward_method != "na":
        return 0.0
    said, truth = fixed.number(said), fixed.number(truth)
    return 0.0 if said is None or truth is None else fixed.mean_relative_accuracy(said, truth)


@published(fixed.format_reward)
def format_reward(text: str) -> float:
    """Opening tags only are counted, and an empty answer is allowed."""
    text = text.strip()
    once = text.count("<think>") == text.count("<answer>") == 1
    return float(once and think_answer(text))
