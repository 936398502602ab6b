# SPDX-License-Identifier: Apache-2.0
"""The rewards of the two systems called Perception-R1: PR1 (linkangheng) and Xiao et al."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import written_box
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.geometry.overlap import iou
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.boxes import first_box, ordered_box
from fastgrpo.rewards.read.faults import BadColumn, Unscorable, short
from fastgrpo.rewards.read.tags import last_answer, pattern
from fastgrpo.rewards.read.words import ngram_repetition

PR1 = "linkangheng/PR1@48d5558"
XIAO = "tongxiao2002/Perception-R1@c47eaf2"
MAX_JUDGEMENT = 65536
MAX_REPEATED = 1 << 14


def _truth(*, solution, frames, **columns) -> str:
    return written_box(_solution_box(solution), frames)


@reward("perception_r1/grounding", columns=("solution",), source=PR1, framed=True, truth=_truth)
def grounding(text: str, *, solution, frames: RowFrames) -> float:
    """IoU^2 of the first box, [..], (..),(..) or (..), with the solution's box.

    Where nobody states a frame, the solution is in thousandths, and so is the answer, unless it has
    no `<|box_start|>` and no coordinate above 1: then it is in shares of the image.

    Source: linkangheng/PR1@48d5558, `pr1_grounding_reward`. "upstream": without `<|box_start|>`
    every coordinate is multiplied by 1000, two empty boxes divide by zero, reversed boxes have
    areas of either sign, and the solution is Python text. "fixed": a reversed box gives 0; the
    solution is a list or JSON.
    """
    truth = _solution_box(solution)
    text = text.replace("<|endoftext|>", "")
    box = first_box(text)
    if box is None:
        raise Unscorable("no_box")
    if frames.stated:
        box = frames.to_solution(box)
    elif "<|box_start|>" not in text and max(box) <= 1:
        box = RowFrames("unit", "thousandths").to_solution(box)
    if not ordered_box(box):
        raise Unscorable("reversed_box")
    return iou(box, truth) ** 2


def _solution_box(solution: Any) -> list[float]:
    box = corners(solution)
    if not ordered_box(box):
        raise BadColumn("solution is not a box")
    return box


def corners(solution: Any) -> Any:
    """A solution's numbers, from a list or from text with brackets or parentheses."""
    if isinstance(solution, str):
        try:
            solution = json.loads(solution.strip().replace("(", "[").replace(")", "]"))
        except ValueError as fault:
            raise BadColumn(f"solution: {fault}") from None
    return list(solution) if isinstance(solution, list | tuple) else solution


@reward("perception_r1/grounding_format", source=PR1)
def grounding_format(text: str) -> float:
    """1 for `<|object_ref_start|>..<|object_ref_end|><|box_start|>..<|box_end|><|im_end|>`.

    Source: linkangheng/PR1@48d5558, `pr1_grounding_format_reward`. "upstream": the bars of the
    pattern are not escaped, so it is an alternation whose branches `^<`, `object_ref_start`,
    `>.*?<`, `object_ref_end`, `><`, `box_start`, `box_end`, `im_end`, `>` match at the start of
    almost any text. "fixed": the tokens in order, from the start to the end of the text.
    """
    whole = (
        r"<\|object_ref_start\|>.*?<\|object_ref_end\|>"
        r"<\|box_start\|>.*?<\|box_end\|>(?:<\|im_end\|>)?"
    )
    return float(pattern(whole).fullmatch(text.replace("<|endoftext|>", "").strip()) is not None)


@reward("perception_r1/accuracy", columns=("solution",), verifies=True, source=XIAO,
        truth=lambda *, solution, **columns: f"<answer>{solution}</answer>")  # fmt: skip
def accuracy(text: str, *, solution) -> float:
    """1 when math-verify finds the answer equal to the solution.

    Source: tongxiao2002/Perception-R1@c47eaf2, `boxed_math_verify_accuracy_reward`. "upstream":
    an answer of several lines is not recognised as one and the whole text is read. "fixed": it is.
    """
    said = short(last_answer(text).strip())
    return float(math_pool.equal(str(solution).strip(), said).equal)


_FORMAT = r"<think>\n.*?\n</think>\n<answer>\n.*?\\boxed\{.+?\}.*?\n</answer>"


@reward("perception_r1/format", source=XIAO)
def boxed_format(text: str, *, perception: bool = False) -> float:
    r"""1 for think and answer blocks on their own lines with a `\boxed{}` in the answer.

    `perception=True` wants a perception block before. Source:
    tongxiao2002/Perception-R1@c47eaf2, `boxed_math_verify_format_reward`. "fixed" equals
    "upstream" but allows blanks around the text.
    """
    return boxed_blocks(text.strip(), perception)


def boxed_blocks(text: str, perception: bool) -> float:
    """1 when the whole text is the blocks in order."""
    whole = (r"<perception>\n.*?\n</perception>\n" if perception else "") + _FORMAT
    return float(pattern(whole).fullmatch(text) is not None)


@reward("perception_r1/ngram_penalty", range=(-2.0, 0.0), fallback=-2.0, source=XIAO)
def ngram_penalty(text: str, *, ngram_size: int = 20, ngram_max_penalty: float = -2.0) -> float:
    """(1 - distinct / all n-grams of the lower-case words) * `ngram_max_penalty`.

    Source: tongxiao2002/Perception-R1@c47eaf2, `ngram_penalty_reward`; the released script uses
    n = 20. "fixed" equals "upstream" on the last 16,384 characters.
    """
    repeated = ngram_repetition(text[-MAX_REPEATED:].lower().split(), ngram_size)
    return max(repeated * ngram_max_penalty, -2.0)


@reward("perception_r1/visual", optional=("judge_output", "visual_key_info"), source=XIAO)
def visual(
    text: str,
    *,
    judge_output: str | None = None,
    visual_key_info: str | None = None,
    judge: Callable[[str, str], str] | None = None,
) -> float:
    """Mean of the judge's 0/1 scores for the key facts of the image, sum / (n + 1e-6).

    The judgement `<info1>1</info1><info2>0</info2>...` is the row's `judge_output`, or
    `judge(text, visual_key_info)`; without either the reward is 0.

    Source: tongxiao2002/Perception-R1@c47eaf2, `batch_visual_key_info_reward`. "upstream": reads
    up to the first missing number. "fixed": divides by n, and the scores must be numbers.
    """
    scores = visual_scores(judgement(text, judge_output, visual_key_info, judge))
    return sum(scores) / max(len(scores), 1)


def judgement(text, judge_output, visual_key_info, judge) -> str:
    """The row's judgement, or the judge's; "" without either."""
    if judge_output is None and judge is not None and visual_key_info:
        judge_output = judge(text, visual_key_info)
    return judge_output or ""


def visual_scores(judged: str) -> list[float]:
    """The numbers in the last `<infoK>` of each K = 1, 2, ..., clipped to [0, 1], text is 0."""
    judged, scores = judged[:MAX_JUDGEMENT], []
    while len(scores) < 1000:
        tag = f"info{len(scores) + 1}>"
        found = _last_between(judged, "<" + tag, "</" + tag)
        if found is None:
            break
        try:
            score = float(found)
        except ValueError:
            score = 0.0
        scores.append(max(0, min(1, score)))
    return scores


def _last_between(text: str, start: str, end: str) -> str | None:
    """From the last `start` that is followed by something and `end`."""
    closed = text.rfind(end)
    opened = text.rfind(start, 0, closed - 1) if closed > 0 else -1
    if opened < 0:
        return None
    opened += len(start)
    return text[opened : text.find(end, opened + 1)]


@reward("perception_r1/total", columns=("solution",), optional=("judge_output", "visual_key_info"),
        range=(-2.0, 1.7), source=XIAO)  # fmt: skip
def total(
    text: str,
    *,
    solution,
    judge_output: str | None = None,
    visual_key_info: str | None = None,
    judge: Callable[[str, str], str] | None = None,
    visual_factor: float = 0.7,
    use_ngram_penalty: bool = True,
) -> float:
    """0.9 accuracy + 0.1 format + 0.7 visual + n-gram penalty.

    Source: tongxiao2002/Perception-R1@c47eaf2, `CustomRewardManager`. Modes as the parts.
    """
    seen = visual(text, judge_output=judge_output, visual_key_info=visual_key_info, judge=judge)
    score = 0.9 * accuracy(text, solution=solution) + 0.1 * boxed_format(text)
    return score + visual_factor * seen + (ngram_penalty(text) if use_ngram_penalty else 0.0)
