# SPDX-License-Identifier: Apache-2.0
"""`curr_reft` as published (ding523/Curr_REFT@f123433)."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.faults import MAX_ANSWER, TEXT_FAULTS
from fastgrpo.rewards.read.tags import DIGIT, SPACE, answer, open_answer, pattern, think_answer
from fastgrpo.rewards.systems import curr_reft as fixed
from fastgrpo.rewards.systems.vlm_r1_upstream import pixel_iou

_FAULTS = (*TEXT_FAULTS, SyntaxError)


@published(fixed.stage1)
def stage1(text: str, *, solution: str, task: str = "judge") -> float:
    """Yes wins when both kinds of word occur."""
    try:
        said, truth = (_judgement(open_answer(side)) for side in (text, solution))
        if task == "math" and math_pool.equal(text, solution).equal:
            return 1.0
        return float(said is not None and said == truth)
    except _FAULTS:
        return 0.0


def _judgement(text: str | None) -> str | None:
    yes, no = fixed.judgements(text) if text is not None else (False, False)
    return "yes" if yes else "no" if no else None


def _options(text: str) -> list[str]:
    """The letters A to E of the upper-cased answer with no ASCII letter beside them, in order."""
    text = open_answer(text).upper().strip()
    found: dict[str, None] = {}
    for i, char in enumerate(text):
        if char in "ABCDE" and not any(
            n.isascii() and n.isalpha() for n in (text[i - 1 : i], text[i + 1 : i + 2])
        ):
            found[char] = None
    return list(found)


@published(fixed.stage2)
def stage2(text: str, *, solution: str) -> float:
    """Options in the same order; math-verify decides without an answer."""
    verified = math_pool.equal(text, solution)
    try:
        said = _options(text)
    except AttributeError:
        return float(verified.equal)
    try:
        return float(said == _options(solution))
    except AttributeError:
        return 0.0


@published(fixed.stage3)
def stage3(
    text: str,
    *,
    solution: str,
    task: str,
    similarity: Callable[[str, str], float] | None = None,
) -> float:
    """The published rule of each task; any fault of detection, classify and math gives 0."""
    if task == "coco_vqa":
        return fixed.similar(text, solution, similarity)
    score = {"detection": _detection, "classify": _classify, "math": _math}.get(task)
    try:
        return 0.0 if score is None else score(text, solution)
    except _FAULTS:
        return 0.0


_FLOAT = rf"({SPACE}*-?{DIGIT}*\.?{DIGIT}+{SPACE}*)"
_BOX = rf"\[{_FLOAT},{_FLOAT},{_FLOAT},{_FLOAT}\]"


def _box(text: str, shape: str = _BOX) -> list[int] | None:
    found = pattern(shape).search(text)
    return [int(float(number)) for number in found.groups()] if found else None


def _detection(text: str, solution: str) -> float:
    said = fixed.loose_answer(text)
    box = _box(said.replace(" ", ""), rf".*{_BOX}") or [0, 0, 0, 0]
    if box == [0, 0, 0, 0]:
        box = _box(said) or box
    content = answer(solution)
    truth = None if content is None else _box(content) or [0, 0, 0, 0]
    return float(pixel_iou(box, truth) > 0.5)


def _classify(text: str, solution: str) -> float:
    truth = set(fixed.split_items(answer(solution) or ""))
    said = set(_listed(fixed.loose_answer(text)))
    return len(truth & said) / len(truth | said) if truth | said else 0.0


def _listed(text: str) -> Any:
    if "[" not in text:
        return fixed.split_items(text)
    if len(text) > MAX_ANSWER:
        raise ValueError("list beyond the length cap")
    return ast.literal_eval(text)


def _math(text: str, solution: str) -> float:
    if math_pool.equal(text, solution).equal:
        return 1.0
    score = float(_options(text) == _options(solution))
    truth, said = open_answer(solution), open_answer(text)
    return 1.0 if truth in said or said in truth else score


_DETECTION_FORMAT = (
    rf"<think>.*?</think>{SPACE}*<answer>.*?\{{.*"
    rf"\[{DIGIT}+,{SPACE}*{DIGIT}+,{SPACE}*{DIGIT}+,{SPACE}*{DIGIT}+\].*\}}.*?</answer>"
)


@published(fixed.format_reward)
def format_reward(text: str, *, task: str | None = None) -> float:
    """Integers in brackets and braces for detection, else the pattern of R1-style code."""
    if task == "detection":
        return float(pattern(_DETECTION_FORMAT).fullmatch(text) is not None)
    return float(think_answer(text))
