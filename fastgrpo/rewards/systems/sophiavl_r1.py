# SPDX-License-Identifier: Apache-2.0
"""SophiaVL-R1's outcome rewards (kxfan2002/SophiaVL-R1@a818494).

The thinking reward and its group weighting are an advantage rule, not a reward function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import thought
from fastgrpo.rewards.read.faults import BadColumn, short
from fastgrpo.rewards.read.mathematics import grade_answer
from fastgrpo.rewards.read.tags import answer, pattern
from fastgrpo.rewards.read.words import rouge_mean, word_error_rate

SOURCE = "kxfan2002/SophiaVL-R1@a818494"


def formatted_answer(text: str) -> str | None:
    """The first answer of a text that starts with a think block, None in another format."""
    if pattern(r"<think>.*?</think>.*<answer>.*?</answer>.*").fullmatch(text) is None:
        return None
    return answer(text)


def _said(text: str) -> str | None:
    content = formatted_answer(text)
    return None if content is None else short(content)


def _truth(*, solution, **columns) -> str:
    return thought(solution if isinstance(solution, str) else ",".join(map(str, solution)))


@reward("sophiavl_r1/math", columns=("solution",), verifies=True, source=SOURCE, truth=_truth)
def math_score(text: str, *, solution: str) -> float:
    """1 when the answer equals the solution by mathruler's rules (`grade_answer`).

    Source: kxfan2002/SophiaVL-R1@a818494, `math_compute_score`; needs think and answer blocks.
    Both modes the same.
    """
    said = _said(text)
    return float(said is not None and grade_answer(said, str(solution)))


@reward("sophiavl_r1/choices", columns=("solution",), source=SOURCE, truth=_truth)
def choices(text: str, *, solution: Sequence[str]) -> float:
    """1 when the comma-separated options are the solution's (a list, or text with commas).

    Source: kxfan2002/SophiaVL-R1@a818494, `choices_compute_score`. "upstream": as many options as
    the solution has elements, each among them, so "A,A" matches ["A", "B"], and a solution that is
    text counts its characters. "fixed": equal sets.
    """
    said = _said(text)
    if said is None:
        return 0.0
    options = [option.strip() for option in said.split(",")]
    truth = solution.split(",") if isinstance(solution, str) else list(solution)
    truth = {str(option).strip() for option in truth}
    return float(set(options) == truth)


@reward("sophiavl_r1/ocr", columns=("solution",), source=SOURCE, truth=_truth)
def ocr(text: str, *, solution: str) -> float:
    """exp(-WER), WER = word edits / words of the solution.

    Source: kxfan2002/SophiaVL-R1@a818494, `ocr_compute_score`. "fixed": an empty solution gives
    None.
    """
    said = _said(text)
    if not str(solution).strip():
        raise BadColumn("solution is empty")
    if said is None:
        return 0.0
    return math.exp(-word_error_rate(solution.strip(), said.strip()))


@reward("sophiavl_r1/free_form", columns=("solution",), source=SOURCE, truth=_truth)
def free_form(text: str, *, solution: str) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L of answer and solution.

    Source: kxfan2002/SophiaVL-R1@a818494, `free_form_compute_score`. "upstream" stems words with
    rouge-score (which must be installed). "fixed": words must be equal, no stemming.
    """
    said = _said(text)
    return 0.0 if said is None else rouge_mean(solution, said)


_KINDS = {"math": math_score, "choices": choices, "ocr": ocr, "free_form": free_form}


@reward("sophiavl_r1/outcome", columns=("solution", "problem_type"), source=SOURCE, truth=_truth)
def outcome(text: str, *, solution: Any, problem_type: str) -> float:
    """The reward the row's `problem_type` names: math, choices, ocr or free_form.

    Source: kxfan2002/SophiaVL-R1@a818494. Modes as the reward chosen; "fixed": another type gives
    None.
    """
    if problem_type not in _KINDS:
        raise BadColumn(f"problem_type {problem_type!r}")
    return _KINDS[problem_type](text, solution=solution)
