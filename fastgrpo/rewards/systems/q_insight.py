# SPDX-License-Identifier: Apache-2.0
"""Q-Insight's rewards (bytedance/Q-Insight@08308fd): quality score, distortion, comparison."""

from __future__ import annotations

import json
import math
from typing import Any

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import thought
from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.items import loads
from fastgrpo.rewards.read.tags import SPACE, answer, pattern

SOURCE = "bytedance/Q-Insight@08308fd"


def _score_truth(*, solution, task, **columns) -> str:
    return thought(json.dumps({"rating": solution} if task == "score" else solution))


@reward("q_insight/score", columns=("solution", "task"), source=SOURCE, truth=_score_truth)
def score(text: str, *, solution: Any, task: str, score_reward_threshold: float = 0.35) -> float:
    """Task "score": [|rating - solution| < threshold]; "dist": 0.25 class + 0.75 level.

    The answer is JSON with "rating", or with "distortion_class" and "severity"; the level counts
    only when the class is right.

    Source: bytedance/Q-Insight@08308fd, `score_reward`; another task gives 0. "upstream": the
    fields are searched anywhere in the first answer, and any fault gives 0. "fixed": the answer is
    read as JSON, words are compared without case, and a bad solution gives None.
    """
    truth = _truth(solution, task)
    content = answer(text)
    if content is None:
        raise Unscorable("no_answer")
    said = loads(content.strip().removeprefix("```json").removesuffix("```").strip())
    if not isinstance(said, dict):
        raise Unscorable("not_an_object")
    if task == "score":
        rating = said.get("rating")
        usable = type(rating) in (int, float) and math.isfinite(rating)
        return float(usable and abs(rating - truth) < score_reward_threshold)
    same = [_word(said.get(key)) == wanted for key, wanted in truth.items()]
    return 0.25 * same[0] + 0.75 * all(same)


def _truth(solution: Any, task: str) -> Any:
    if task == "score" and type(solution) in (int, float) and math.isfinite(solution):
        return solution
    if task == "dist" and isinstance(solution, dict):
        truth = {key: _word(solution.get(key)) for key in ("distortion_class", "severity")}
        if all(truth.values()):
            return truth
    raise BadColumn(f"solution or task {task!r} cannot be used")


def _word(value: Any) -> str | None:
    return value.strip().lower() if isinstance(value, str) else None


@reward("q_insight/comparison", columns=("solution",), source=SOURCE,
        truth=lambda *, solution, **columns: thought(str(solution)))  # fmt: skip
def comparison(text: str, *, solution: str) -> float:
    """1 when the first answer is exactly the solution ("Image A", "Image B", "Similar").

    Source: bytedance/Q-Insight@08308fd, `qinsight_comparison.score_reward`. "fixed" ignores case.
    """
    content = answer(text)
    if content is None:
        return 0.0
    return float(content.strip().lower() == str(solution).strip().lower())


_HEAD = rf"<think>{SPACE}*\n.*?\n{SPACE}*</think>{SPACE}*\n<answer>{SPACE}*\n"
_TAIL = rf"\n{SPACE}*</answer>{SPACE}*"


@reward("q_insight/format", optional=("task",), source=SOURCE)
def format_reward(text: str, *, task: str | None = None) -> float:
    """1 for think and answer tags on their own lines and one flat {...} as answer.

    Task "comparison" allows any answer. Source: bytedance/Q-Insight@08308fd, `format_reward`.
    "fixed" equals "upstream" with blanks before the text allowed.
    """
    return blocks(text.lstrip(), task)


def blocks(text: str, task: str | None) -> float:
    """1 when the whole text is the two blocks."""
    body = ".*?" if task == "comparison" else rf"\{{[^{{}}]*\}}{SPACE}*"
    return float(pattern(_HEAD + body + _TAIL).fullmatch(text) is not None)
