"""SpatialLadder's rewards (ZJU-REAL/SpatialLadder@87320be): choices, relative accuracy, format."""

from __future__ import annotations

import numpy as np

from fastgrpo.rewards import text as texts
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import clean_text, think_answer
from fastgrpo.rewards.vlm_r1 import think_then_answer

SOURCE = "ZJU-REAL/SpatialLadder@87320be"
CONFIDENCES = np.linspace(0.5, 0.95, 10)
MAX_ANSWER = 8192


def mean_relative_accuracy(said: float, truth: float) -> float:
    """Mean over c in {0.50, 0.55 ... 0.95} of [|said - truth| / truth <= 1 - c]."""
    return float((abs(said - truth) / truth <= 1 - CONFIDENCES).mean())


@reward(
    "spatialladder/accuracy", columns=("answer",), optional=("accu_reward_method",), source=SOURCE
)
def accuracy(text: str, *, answer: str, accu_reward_method: str = "mca", compat: str) -> float:
    """Row's method "mca": equality of the cleaned answers; "na": mean relative accuracy.

    Source: ZJU-REAL/SpatialLadder@87320be, `accuracy_reward`; another method gives 0. "upstream":
    a true value of 0 divides by zero and a negative one accepts everything. "fixed": relative to
    |truth|, and to truth 0 only 0 is right; a true value that is no number gives None.
    """
    if accu_reward_method not in ("mca", "na"):
        return 0.0
    said, truth = _cleaned(text, compat), clean_text(str(answer))
    if accu_reward_method == "mca":
        return float(said == truth)
    said, truth = _number(said), _number(truth)
    if compat == "upstream":
        return 0.0 if said is None or truth is None else mean_relative_accuracy(said, truth)
    if truth is None:
        raise BadColumn("answer is not a number")
    if said is None:
        raise Unscorable("no_number")
    if truth == 0:
        return float(said == 0)
    return mean_relative_accuracy(said if truth > 0 else -said, abs(truth))


def _cleaned(text: str, compat: str) -> str:
    if compat == "fixed":
        content = texts.answer(text, last=True)
        text = text if content is None else content
        if len(text) > MAX_ANSWER:
            raise Unscorable("answer_too_long")
    return clean_text(text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@reward("spatialladder/format", source=SOURCE)
def format_reward(text: str, *, compat: str) -> float:
    """1 for exactly one think and one answer block, nothing else but blanks around them.

    Source: ZJU-REAL/SpatialLadder@87320be, `format_reward`. "upstream" counts opening tags only
    and allows an empty answer; "fixed" as `vlm_r1/format`.
    """
    if compat == "fixed":
        return float(think_then_answer(text) is not None)
    text = text.strip()
    once = text.count("<think>") == text.count("<answer>") == 1
    return float(once and think_answer(text))
