# SPDX-License-Identifier: Apache-2.0
"""VLAA-Thinking, by its README figure: one rule per type of problem."""

from __future__ import annotations

from typing import Any

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import thought, written_box
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.read.faults import BadColumn
from fastgrpo.rewards.read.tags import last_answer
from fastgrpo.rewards.systems.vlm_r1 import score_box, solution_box
from fastgrpo.rewards.systems.vlm_r1_answers import math_reward, mcq


def _truth(*, solution, problem_type, frames, **columns) -> str:
    if problem_type == "iou":
        return thought(written_box(solution_box(solution), frames))
    return thought(last_answer(str(solution)).strip())


@reward("vlaa_thinking/rule", columns=("solution", "problem_type"),
        optional=("options", "choices", "problem"), verifies=True, framed=True, truth=_truth,
        source="VLAA-Thinking, our own reading of its README figure")  # fmt: skip
def vlaa_rule(
    text: str, *, solution: Any, problem_type: str, frames: RowFrames, options=None, choices=None,
    problem=None,
) -> float:  # fmt: skip
    """By type: "digit" equal integers, "mcq" the letter, "math" math-verify, "iou" the box's IoU.

    VLAA-Thinking's figure names the four rules; the parsing is VLM-R1's "fixed" one.
    """
    if problem_type == "digit":
        said, truth = (_integer(last_answer(side)) for side in (text, str(solution)))
        if truth is None:
            raise BadColumn("solution is not an integer")
        return float(said == truth)
    if problem_type == "mcq":
        return mcq(text, solution=solution, options=options, choices=choices, problem=problem)
    if problem_type == "math":
        return math_reward(text, solution=solution)
    if problem_type == "iou":
        return score_box(text, solution_box(solution), frames)
    raise BadColumn(f"problem_type {problem_type!r}")


def _integer(text: str) -> int | None:
    text = text.strip().rstrip(".")
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None
