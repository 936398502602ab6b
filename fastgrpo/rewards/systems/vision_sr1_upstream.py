# SPDX-License-Identifier: Apache-2.0
"""`vision_sr1` as published (zli12321/Vision-SR1@4480e08)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read.mathematics import grade_answer
from fastgrpo.rewards.systems import vision_sr1 as fixed


@published(fixed.format_reward)
def format_reward(text: str) -> float:
    """Of a text of any length."""
    return fixed.blocks(text)


@published(fixed.accuracy)
def accuracy(text: str, *, solution: str) -> float:
    """Without a box the answer is the text "None"."""
    return float(grade_answer(fixed.boxed_answer(fixed.tight_tags(text)), str(solution)))


@published(fixed.description_accuracy)
def description_accuracy(text: str, *, solution: str, description_answer: str) -> float:
    """The published code leaves the second pass untouched, without tightening its tags."""
    return float(grade_answer(fixed.boxed_answer(description_answer), str(solution)))


@published(fixed.total)
def total(
    text: str, *, solution: str, description_answer: str, format_weight: float = 0.1
) -> float:
    """The same sum of the published parts."""
    right = accuracy(text, solution=solution)
    seen = description_accuracy(text, solution=solution, description_answer=description_answer)
    return (1 - format_weight) * right + format_weight * format_reward(text) + seen
