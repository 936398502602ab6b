# SPDX-License-Identifier: Apache-2.0
"""`sophiavl_r1` as published (kxfan2002/SophiaVL-R1@a818494)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read.mathematics import grade_answer
from fastgrpo.rewards.read.words import word_error_rate
from fastgrpo.rewards.systems import sophiavl_r1 as fixed


@published(fixed.math_score)
def math_score(text: str, *, solution: str) -> float:
    """Of an answer of any length."""
    said = fixed.formatted_answer(text)
    return float(said is not None and grade_answer(said, str(solution)))


@published(fixed.choices)
def choices(text: str, *, solution: Sequence[str]) -> float:
    """As many options as the solution has elements, each among them."""
    said = fixed.formatted_answer(text)
    if said is None:
        return 0.0
    options = [option.strip() for option in said.split(",")]
    return float(len(options) == len(solution) and all(o in solution for o in options))


@published(fixed.ocr)
def ocr(text: str, *, solution: str) -> float:
    """An empty solution is compared too."""
    said = fixed.formatted_answer(text)
    return 0.0 if said is None else math.exp(-word_error_rate(solution.strip(), said.strip()))


@published(fixed.free_form)
def free_form(text: str, *, solution: str) -> float:
    """rouge-score with stemmed words."""
    said = fixed.formatted_answer(text)
    if said is None:
        return 0.0
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


@published(fixed.outcome)
def outcome(text: str, *, solution: Any, problem_type: str) -> float:
    """The published reward that the row's `problem_type` names."""
    if problem_type not in _KINDS:
        raise NotImplementedError(f"problem_type {problem_type!r}")
    return _KINDS[problem_type](text, solution=solution)
