# SPDX-License-Identifier: Apache-2.0
"""`q_insight` as published (bytedance/Q-Insight@08308fd)."""

from __future__ import annotations

from typing import Any

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read.tags import DIGIT, SPACE, answer, pattern
from fastgrpo.rewards.systems import q_insight as fixed

_RATING = rf'"rating"{SPACE}*:{SPACE}*([{DIGIT}.]+)'
_DISTORTION = (
    rf'"distortion_class"{SPACE}*:{SPACE}*"([^"]+)".*?"severity"{SPACE}*:{SPACE}*"([^"]+)"'
)


@published(fixed.score)
def score(text: str, *, solution: Any, task: str, score_reward_threshold: float = 0.35) -> float:
    """The fields are searched anywhere in the first answer; any fault gives 0."""
    content = answer(text)
    try:
        return 0.0 if content is None else _score(content, solution, task, score_reward_threshold)
    except (ValueError, TypeError, AttributeError):
        return 0.0


def _score(content: str, solution: Any, task: str, threshold: float) -> float:
    if task == "score":
        found = pattern(_RATING).search(content)
        return float(found is not None and abs(float(found.group(1)) - solution) < threshold)
    if task != "dist":
        return 0.0
    found = pattern(_DISTORTION).search(content)
    if found is None or found.group(1).strip() != solution.get("distortion_class"):
        return 0.0
    return 0.25 + 0.75 * (found.group(2).strip() == solution.get("severity"))


@published(fixed.comparison)
def comparison(text: str, *, solution: str) -> float:
    """Character for character."""
    content = answer(text)
    return float(content is not None and content.strip() == solution)


@published(fixed.format_reward)
def format_reward(text: str, *, task: str | None = None) -> float:
    """No blanks before the text."""
    return fixed.blocks(text, task)
