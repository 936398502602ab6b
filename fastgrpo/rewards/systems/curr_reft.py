# SPDX-License-Identifier: Apache-2.0
"""Curr-ReFT's three-stage rewards (ding523/Curr_REFT@f123433): judgement, choice, open tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import thought, written_box
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.geometry.overlap import iou
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.boxes import first_box, ordered_box
from fastgrpo.rewards.read.choices import read_options, same_choice
from fastgrpo.rewards.read.faults import MAX_ANSWER, BadColumn, short
from fastgrpo.rewards.read.tags import (
    answer,
    answer_or_all,
    open_answer,
    pattern,
    think_then_answer,
)

SOURCE = "ding523/Curr_REFT@f123433"


def _said(text: str) -> str:
    """The first answer, closed or not, or the whole text."""
    content = open_answer(text)
    return short(text.strip() if content is None else content)


YES = r"(?:^|[^a-z])(?:yes|true|correct)(?:[^a-z]|$)"
NO = r"(?:^|[^a-z])(?:no|false|incorrect)(?:[^a-z]|$)"


def judgements(text: str) -> tuple[bool, bool]:
    """Whether the text says yes, and whether it says no."""
    yes, no = (pattern(words).search(text.lower()) is not None for words in (YES, NO))
    return yes, no


def _truth(*, solution, **columns) -> str:
    return thought(_said(solution))


@reward("curr_reft/stage1", columns=("solution",), optional=("task",), verifies=True, source=SOURCE,
        truth=_truth)  # fmt: skip
def stage1(text: str, *, solution: str, task: str = "judge") -> float:
    """1 when answer and solution make the same yes/no judgement.

    Words: yes, true, correct; no, false, incorrect. Task "math" also gets 1 by math-verify.

    Source: ding523/Curr_REFT@f123433, Stage1 `iou_reward`. "upstream": yes wins when both kinds
    occur. "fixed": an answer with both kinds gives 0, a solution without either None.
    """
    truth = judgements(_said(solution))
    decided = truth[0] != truth[1]
    if not decided and task != "math":
        raise BadColumn("solution is neither yes nor no")
    right = decided and judgements(_said(text)) == truth
    return float(right or (task == "math" and math_pool.equal(text, solution).equal))


@reward("curr_reft/stage2", columns=("solution",), optional=("options", "choices", "problem"),
        source=SOURCE, truth=_truth)  # fmt: skip
def stage2(text: str, *, solution: str, options=None, choices=None, problem=None) -> float:
    """1 when answer and solution choose the same options, by `read.choices`.

    Source: ding523/Curr_REFT@f123433, Stage2 `iou_reward`. "upstream": every letter A to E with no
    letter beside it counts, options must come in the same order, and no options on both sides are
    equal; without an answer, math-verify decides. "fixed": the same set, which must not be empty.
    """
    known = read_options(options if options is not None else choices, problem)
    same = same_choice(_said(text), _said(solution), known)
    if same is None:
        raise BadColumn("solution names no option")
    return float(same)


def _stage3_truth(*, solution, frames, task, **columns) -> str:
    if task != "detection":
        return _truth(solution=solution)
    return thought(f'{{"bbox_2d": {written_box(_solution_box(solution), frames)}}}')


@reward("curr_reft/stage3", columns=("solution", "task"), source=SOURCE, framed=True,
        truth=_stage3_truth)  # fmt: skip
def stage3(
    text: str,
    *,
    solution: str,
    task: str,
    frames: RowFrames,
    similarity: Callable[[str, str], float] | None = None,
) -> float:
    """By task. detection: IoU > 0.5; classify: Jaccard of the named items; math: math-verify, or
    the same options, or one text within the other; coco_vqa: `similarity` > 0.95: 1, > 0.9: 0.2.

    Source: ding523/Curr_REFT@f123433, Stage3 `iou_reward`; another task gives 0. "upstream": IoU in
    VLM-R1's -1/+1 convention on truncated coordinates; two math answers without any option count
    as the same options, so every tagged answer without letters A to E is right. "fixed": continuous
    IoU, and math needs math-verify or the same, non-empty options.
    """
    if task == "detection":
        return _detection(text, solution, frames)
    if task == "classify":
        return _classify(text, solution)
    if task == "math":
        return _math(text, solution)
    return similar(text, solution, similarity) if task == "coco_vqa" else 0.0


# A tag that is never closed: up to the next "<", or without the last character of the text.
_PARTIAL = r"<answer>(.*?)(?:\n?\z|<|[^<]\n?\z)"


def loose_answer(text: str) -> str:
    """The first answer, an unclosed one in part, or the whole text."""
    content = answer(text)
    if content is None:
        partial = pattern(_PARTIAL).search(text)
        content = partial.group(1) if partial else text
    return content.strip()


def _solution_box(solution: Any) -> list[float]:
    box = first_box(answer_or_all(solution)) if isinstance(solution, str) else solution
    if not ordered_box(box):
        raise BadColumn("solution has no box")
    return list(box)


def _detection(text: str, solution: str, frames: RowFrames) -> float:
    truth = _solution_box(solution)
    box = first_box(short(loose_answer(text)))
    if box is None:
        return 0.0
    box = frames.to_solution(box)
    return float(ordered_box(box) and iou(box, truth) > 0.5)


def _classify(text: str, solution: str) -> float:
    named = split_items(answer(solution) or "") or split_items(solution)
    truth = {item.lower() for item in named}
    if not truth:
        raise BadColumn("solution names no class")
    words = {item.strip("[]'\" ").lower() for item in split_items(short(loose_answer(text)))} - {""}
    return len(truth & words) / len(truth | words)


def split_items(text: str) -> list[str]:
    """The words between blanks and commas, Chinese ones too."""
    for comma in ",，、":
        text = text.replace(comma, " ")
    return text.split()


def _math(text: str, solution: str) -> float:
    said, truth = _said(text), answer_or_all(solution).strip()
    if math_pool.equal(said, truth).equal:
        return 1.0
    return float(bool(same_choice(said, truth, strict=True)))


def similar(text: str, solution: str, similarity: Callable[[str, str], float] | None) -> float:
    """1 for a similarity above 0.95, 0.2 above 0.9."""
    if similarity is None:
        raise InputError("curr_reft/stage3: task 'coco_vqa' needs the setting 'similarity'")
    cosine = similarity(*(answer_or_all(side).strip()[:MAX_ANSWER] for side in (text, solution)))
    return 1.0 if cosine > 0.95 else 0.2 if cosine > 0.9 else 0.0


@reward("curr_reft/format", optional=("task",), source=SOURCE)
def format_reward(text: str, *, task: str | None = None) -> float:
    """1 for `<think>..</think> <answer>..</answer>`; in task "detection" with {..[a, b, c, d]..}.

    Source: ding523/Curr_REFT@f123433, `format_reward`. "fixed": as `vlm_r1/format`, the box may
    have decimals.
    """
    content = think_then_answer(text)
    if content is None:
        return 0.0
    inner = content[content.find("{") + 1 : content.rfind("}")] if "{" in content else ""
    return float(task != "detection" or first_box(inner) is not None)
