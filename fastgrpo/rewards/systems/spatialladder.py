# SPDX-License-Identifier: Apache-2.0
"""SpatialLadder's rewards (ZJU-REAL/SpatialLadder@87320be): choices, relative accuracy, format."""

from __future__ import annotations

import numpy as np

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import thought
from fastgrpo.rewards.read.choices import same_choice
from fastgrpo.rewards.read.faults import BadColumn, Unscorable, short
from fastgrpo.rewards.read.tags import last_answer, think_then_answer
from fastgrpo.rewards.read.words import clean_text

SOURCE = "ZJU-REAL/SpatialLadder@87320be"
CONFIDENCES = np.linspace(0.5, 0.95, 10)


def mean_relative_accuracy(said: float, truth: float) -> float:
    """Mean over c in {0.50, 0.55 ... 0.95} of [|said - truth| / truth <= 1 - c]."""
    return float((abs(said - truth) / truth <= 1 - CONFIDENCES).mean())


@reward(
    "spatialladder/accuracy",
    columns=("answer",),
    optional=("accu_reward_method",),
    source=SOURCE,
    truth=lambda *, answer, **columns: thought(last_answer(str(answer))),
)
def accuracy(text: str, *, answer: str, accu_reward_method: str = "mca") -> float:
    """Row's method "mca": the same choice, or equal cleaned answers; "na": mean relative accuracy.

    Source: ZJU-REAL/SpatialLadder@87320be, `accuracy_reward`; another method gives 0. "upstream":
    choices are compared as cleaned text; a true value of 0 divides by zero and a negative one
    accepts everything. "fixed": relative to |truth|, and to truth 0 only 0 is right; a true value
    that is no number gives None.
    """
    if accu_reward_method not in ("mca", "na"):
        return 0.0
    said = short(last_answer(text))
    if accu_reward_method == "mca":
        same = same_choice(said, str(answer), strict=True)
        return float(clean_text(said) == clean_text(str(answer)) if same is None else same)
    said, truth = number(clean_text(said)), number(clean_text(str(answer)))
    if truth is None:
        raise BadColumn("answer is not a number")
    if said is None:
        raise Unscorable("no_number")
    if truth == 0:
        return float(said == 0)
    return mean_relative_accuracy(said if truth > 0 else -said, abs(truth))


def number(text: str) -> float | None:
    """The text as a number, None where it is none."""
    try:
        return float(text)
    except ValueError:
        return None


@reward("spatialladder/format", source=SOURCE)
def format_reward(text: str) -> float:
    """1 for exactly one think and one answer block, nothing else but blanks around them.

    Source: ZJU-REAL/SpatialLadder@87320be, `format_reward`. "upstream" counts opening tags only
    and allows an empty answer; "fixed" as `vlm_r1/format`.
    """
    return float(think_then_answer(text) is not None)
