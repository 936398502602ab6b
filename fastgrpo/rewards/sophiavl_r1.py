"""SophiaVL-R1's outcome rewards (kxfan2002/SophiaVL-R1@a818494).

The thinking reward and its group weighting are an advantage rule, not a reward function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards.math_answers import grade_answer
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import answer, pattern, rouge_mean, word_error_rate

SOURCE = "kxfan2002/SophiaVL-R1@a818494"
MAX_ANSWER = 8192


def _formatted_answer(text: str, compat: str) -> str | None:
    """The first answer of a text that starts with a think block, None in another format."""
    if pattern(r"<think>.*?</think>.*<answer>.*?</answer>.*").fullmatch(text) is None:
        return None
    content = answer(text)
    if compat == "fixed" and len(content) > MAX_ANSWER:
        raise Unscorable("answer_too_long")
    return content


@reward("sophiavl_r1/math", columns=("solution",), verifies=True, source=SOURCE)
def math_score(text: str, *, solution: str, compat: str) -> float:
    """1 when the answer equals the solution by mathruler's rules (`grade_answer`).

    Source: kxfan2002/SophiaVL-R1@a818494, `math_compute_score`; needs think and answer blocks.
    Both modes the same.
    """
    said = _formatted_answer(text, compat)
    return float(said is not None and grade_answer(said, str(solution)))


@reward("sophiavl_r1/choices", columns=("solution",), source=SOURCE)
def choices(text: str, *, solution: Sequence[str], compat: str) -> float:
    """1 when the comma-separated options are the solution's (a list, or text with commas).

    Source: kxfan2002/SophiaVL-R1@a818494, `choices_compute_score`. "upstream": as many options as
    the solution has elements, each among them, so "A,A" matches ["A", "B"], and a solution that is
    text counts its characters. "fixed": equal sets.
    """
    said = _formatted_answer(text, compat)
    if said is None:
        return 0.0
    options = [option.strip() for option in said.split(",")]
    if compat == "upstream":
        return float(len(options) == len(solution) and all(o in solution for o in options))
    truth = solution.split(",") if isinstance(solution, str) else list(solution)
    truth = {str(option).strip() for option in truth}
    return float(set(options) == truth)


@reward("sophiavl_r1/ocr", columns=("solution",), source=SOURCE)
def ocr(text: str, *, solution: str, compat: str) -> float:
    """exp(-WER), WER = word edits / words of the solution.

    Source: kxfan2002/SophiaVL-R1@a818494, `ocr_compute_score`. "fixed": an empty solution gives
    None.
    """
    said = _formatted_answer(text, compat)
    if compat == "fixed" and not str(solution).strip():
        raise BadColumn("solution is empty")
    if said is None:
        return 0.0
    return math.exp(-word_error_rate(solution.strip(), said.strip()))


@reward("sophiavl_r1/free_form", columns=("solution",), source=SOURCE)
def free_form(text: str, *, solution: str, compat: str) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L of answer and solution.

    Source: kxfan2002/SophiaVL-R1@a818494, `free_form_compute_score`. "upstream" stems words with
    rouge-score (which must be installed). "fixed": words must be equal, no stemming.
    """
    said = _formatted_answer(text, compat)
    if said is None:
        return 0.0
    if compat == "fixed":
        return rouge_mean(solution, said)
    try:
        from rouge_score import rouge_scorer
    except ImportError as missing:
        raise InputError(
            "sophiavl_r1/free_form: compat='upstream' needs the package rouge-score"
        ) from missing
    kinds = ["rouge1", "rouge2", "rougeL"]
    said, truth = (side.replace("\n", " ").strip()[:65536] for side in (said, solution))
    scores = rouge_scorer.RougeScorer(kinds, use_stemmer=True).score(said, truth)
    return sum(scores[kind].fmeasure for kind in kinds) / 3


_KINDS = {"math": math_score, "choices": choices, "ocr": ocr, "free_form": free_form}


@reward("sophiavl_r1/outcome", columns=("solution", "problem_type"), source=SOURCE)
def outcome(text: str, *, solution: Any, problem_type: str, compat: str) -> float:
    """The reward the row's `problem_type` names: math, choices, ocr or free_form.

    Source: kxfan2002/SophiaVL-R1@a818494. Modes as the reward chosen; "fixed": another type gives
    None.
    """
    if problem_type not in _KINDS:
        if compat == "upstream":
            raise NotImplementedError(f"problem_type {problem_type!r}")
        raise BadColumn(f"problem_type {problem_type!r}")
    return _KINDS[problem_type](text, solution=solution, compat=compat)
