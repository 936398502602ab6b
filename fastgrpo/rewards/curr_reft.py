"""Curr-ReFT's three-stage rewards (ding523/Curr_REFT@f123433): judgement, choice, open tasks."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards import math_pool
from fastgrpo.rewards.boxes import iou_continuous, iou_vlm_r1, ordered_box
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import (
    DIGIT,
    SPACE,
    answer,
    lone_letters,
    open_answer,
    pattern,
    think_answer,
)
from fastgrpo.rewards.vlm_r1 import think_then_answer

SOURCE = "ding523/Curr_REFT@f123433"
MAX_ANSWER = 8192
_FAULTS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
)


def _open_answer(text: str, compat: str) -> str:
    content = open_answer(text)
    if compat == "fixed":
        content = text.strip() if content is None else content
        if len(content) > MAX_ANSWER:
            raise Unscorable("answer_too_long")
    return content


_YES = r"(?:^|[^a-z])(?:yes|true|correct)(?:[^a-z]|$)"
_NO = r"(?:^|[^a-z])(?:no|false|incorrect)(?:[^a-z]|$)"


def _judgement(text: str | None, compat: str) -> str | None:
    if text is None:
        return None
    text = text.lower()
    yes, no = (pattern(words).search(text) for words in (_YES, _NO))
    if compat == "fixed" and yes and no:
        return None
    return "yes" if yes else "no" if no else None


@reward("curr_reft/stage1", columns=("solution",), optional=("task",), verifies=True, source=SOURCE)
def stage1(text: str, *, solution: str, task: str = "judge", compat: str) -> float:
    """1 when answer and solution make the same yes/no judgement.

    Words: yes, true, correct; no, false, incorrect. Task "math" also gets 1 by math-verify.

    Source: ding523/Curr_REFT@f123433, Stage1 `iou_reward`. "upstream": yes wins when both kinds
    occur. "fixed": an answer with both kinds gives 0, a solution without either None.
    """
    try:
        said = _judgement(_open_answer(text, compat), compat)
        truth = _judgement(_open_answer(solution, compat), compat)
        if compat == "fixed" and truth is None and task != "math":
            raise BadColumn("solution is neither yes nor no")
        score = float(said is not None and said == truth)
        if task == "math" and math_pool.equal(text, solution).equal:
            score = 1.0
        return score
    except (BadColumn, Unscorable):
        raise
    except _FAULTS:
        return 0.0


def _options(text: str, compat: str) -> list[str]:
    content = _open_answer(text, compat)
    if content is None:
        raise AttributeError("no answer")
    return lone_letters(content, "ABCDE")


@reward("curr_reft/stage2", columns=("solution",), source=SOURCE)
def stage2(text: str, *, solution: str, compat: str) -> float:
    """1 when answer and solution name the same options A to E.

    Source: ding523/Curr_REFT@f123433, Stage2 `iou_reward`. "upstream": the options must come in
    the same order, and no options on both sides are equal; without an answer, math-verify decides.
    "fixed": the same set, which must not be empty.
    """
    if compat == "fixed":
        truth = set(_options(solution, compat))
        if not truth:
            raise BadColumn("solution names no option")
        return float(set(_options(text, compat)) == truth)
    try:
        verified = math_pool.equal(text, solution)
        said = _options(text, compat)
    except AttributeError:
        return float(verified.equal)
    try:
        return float(said == _options(solution, compat))
    except AttributeError:
        return 0.0


@reward("curr_reft/stage3", columns=("solution", "task"), source=SOURCE)
def stage3(
    text: str,
    *,
    solution: str,
    task: str,
    similarity: Callable[[str, str], float] | None = None,
    compat: str,
) -> float:
    """By task. detection: IoU > 0.5; classify: Jaccard of the named items; math: math-verify, or
    the same options, or one text within the other; coco_vqa: `similarity` > 0.95: 1, > 0.9: 0.2.

    Source: ding523/Curr_REFT@f123433, Stage3 `iou_reward`; another task gives 0. "upstream": IoU in
    VLM-R1's -1/+1 convention on truncated coordinates; two math answers without any option count
    as the same options, so every tagged answer without letters A to E is right. "fixed": continuous
    IoU, and math needs math-verify or the same, non-empty options.
    """
    if task == "detection":
        return _detection(text, solution, compat)
    if task == "classify":
        return _classify(text, solution, compat)
    if task == "math":
        return _math(text, solution, compat)
    if task == "coco_vqa":
        return _similar(text, solution, similarity)
    return 0.0


_FLOAT = rf"({SPACE}*-?{DIGIT}*\.?{DIGIT}+{SPACE}*)"
_BOX = rf"\[{_FLOAT},{_FLOAT},{_FLOAT},{_FLOAT}\]"
# A tag that is never closed: up to the next "<", or without the last character of the text.
_PARTIAL = r"<answer>(.*?)(?:\n?\z|<|[^<]\n?\z)"


def _loose_answer(text: str) -> str:
    content = answer(text)
    if content is None:
        partial = pattern(_PARTIAL).search(text)
        content = partial.group(1) if partial else text
    return content.strip()


def _box(text: str, shape: str = _BOX) -> list[int] | None:
    found = pattern(shape).search(text)
    return [int(float(number)) for number in found.groups()] if found else None


def _detection(text: str, solution: str, compat: str) -> float:
    if compat == "fixed":
        content = answer(solution)
        truth = _box(solution if content is None else content)
        if not ordered_box(truth):
            raise BadColumn("solution has no box")
        said = _loose_answer(text)
        if len(said) > MAX_ANSWER:
            raise Unscorable("answer_too_long")
        found = pattern(_BOX).search(said)
        box = [float(number) for number in found.groups()] if found else None
        return float(ordered_box(box) and iou_continuous(box, truth) > 0.5)
    try:
        said = _loose_answer(text)
        box = _box(said.replace(" ", ""), rf".*{_BOX}") or [0, 0, 0, 0]
        if box == [0, 0, 0, 0]:
            box = _box(said) or box
        content = answer(solution)
        truth = None if content is None else _box(content) or [0, 0, 0, 0]
        return float(iou_vlm_r1(box, truth) > 0.5)
    except _FAULTS:
        return 0.0


def _classify(text: str, solution: str, compat: str) -> float:
    content = answer(solution)
    truth = set(_split(content or ""))
    if compat == "fixed":
        truth = {item.lower() for item in (truth or _split(solution))}
        if not truth:
            raise BadColumn("solution names no class")
        said = _loose_answer(text)
        if len(said) > MAX_ANSWER:
            raise Unscorable("answer_too_long")
        words = {item.strip("[]'\" ").lower() for item in _split(said)} - {""}
        return len(truth & words) / len(truth | words)
    try:
        said = set(_listed(_loose_answer(text)))
        return len(truth & said) / len(truth | said) if truth | said else 0.0
    except _FAULTS:
        return 0.0


def _split(text: str) -> list[str]:
    for comma in ",，、":
        text = text.replace(comma, " ")
    return text.split()


def _listed(text: str) -> Any:
    if "[" not in text:
        return _split(text)
    if len(text) > MAX_ANSWER:
        raise ValueError("list beyond the length cap")
    return ast.literal_eval(text)


def _math(text: str, solution: str, compat: str) -> float:
    if compat == "fixed":
        said = _open_answer(text, compat)
        content = answer(solution)
        truth = (solution if content is None else content).strip()
        if math_pool.equal(said, truth).equal:
            return 1.0
        options = _options(solution, compat)
        return float(bool(options) and _options(text, compat) == options)
    if math_pool.equal(text, solution).equal:
        return 1.0
    try:
        score = float(_options(text, compat) == _options(solution, compat))
        truth, said = open_answer(solution), open_answer(text)
        return 1.0 if truth in said or said in truth else score
    except _FAULTS:
        return 0.0


def _similar(text: str, solution: str, similarity) -> float:
    if similarity is None:
        raise InputError("curr_reft/stage3: task 'coco_vqa' needs the setting 'similarity'")
    sides = []
    for side in (text, solution):
        content = answer(side)
        sides.append((side if content is None else content).strip()[:MAX_ANSWER])
    cosine = similarity(*sides)
    return 1.0 if cosine > 0.95 else 0.2 if cosine > 0.9 else 0.0


_DETECTION_FORMAT = (
    rf"<think>.*?</think>{SPACE}*<answer>.*?\{{.*"
    rf"\[{DIGIT}+,{SPACE}*{DIGIT}+,{SPACE}*{DIGIT}+,{SPACE}*{DIGIT}+\].*\}}.*?</answer>"
)


@reward("curr_reft/format", optional=("task",), source=SOURCE)
def format_reward(text: str, *, task: str | None = None, compat: str) -> float:
    """1 for `<think>..</think> <answer>..</answer>`; in task "detection" with {..[a, b, c, d]..}.

    Source: ding523/Curr_REFT@f123433, `format_reward`. "fixed": as `vlm_r1/format`, the box may
    have decimals.
    """
    if compat == "upstream":
        if task == "detection":
            return float(pattern(_DETECTION_FORMAT).fullmatch(text) is not None)
        return float(think_answer(text))
    content = think_then_answer(text)
    if content is None:
        return 0.0
    boxed = rf"\{{.*{_BOX}.*\}}".replace("(", "(?:")
    return float(task != "detection" or pattern(boxed).search(content) is not None)
