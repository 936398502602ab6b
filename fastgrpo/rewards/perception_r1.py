"""The rewards of the two systems called Perception-R1: PR1 (linkangheng) and Xiao et al."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastgrpo.rewards import math_pool
from fastgrpo.rewards.boxes import iou_continuous, ordered_box
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import SPACE, answer, ngram_repetition, one_line_answer, pattern

PR1 = "linkangheng/PR1@48d5558"
XIAO = "tongxiao2002/Perception-R1@c47eaf2"
MAX_ANSWER = 8192
MAX_JUDGEMENT = 65536
MAX_REPEATED = 1 << 14

_FLOAT = r"(-?\p{Nd}+(?:\.\p{Nd}+)?)"
_BLANK = rf"{SPACE}*"
_BOXES = (
    rf"\[{_BLANK}{_FLOAT},{_BLANK}{_FLOAT},{_BLANK}{_FLOAT},{_BLANK}{_FLOAT}{_BLANK}\]",
    rf"\({_BLANK}{_FLOAT},{_BLANK}{_FLOAT},{_BLANK}{_FLOAT},{_BLANK}{_FLOAT}{_BLANK}\)",
    rf"\({_BLANK}{_FLOAT},{_BLANK}{_FLOAT}\),{_BLANK}\({_BLANK}{_FLOAT},{_BLANK}{_FLOAT}\)",
)


@reward("perception_r1/grounding", columns=("solution",), source=PR1)
def grounding(text: str, *, solution, compat: str) -> float:
    """IoU^2 of the first box, [..], (..) or (..),(..), with the solution's box.

    Without `<|box_start|>` the coordinates are shares and are multiplied by 1000.

    Source: linkangheng/PR1@48d5558, `pr1_grounding_reward`. "upstream": two empty boxes divide by
    zero, reversed boxes have areas of either sign, and the solution is Python text. "fixed": a
    reversed box gives 0; a box with a coordinate above 1 is never taken for shares; the solution
    is a list or JSON.
    """
    text = text.replace("<|endoftext|>", "")
    scaled = "<|box_start|>" in text
    box = _first_box(text)
    if compat == "upstream":
        said = box if box else [0, 0, 0, 0]
        said = said if scaled else [int(v * 1000) for v in said]
        return _upstream_iou(said, _corners(solution)) ** 2
    truth = _corners(solution)
    if not ordered_box(truth):
        raise BadColumn("solution is not a box")
    if box is None:
        raise Unscorable("no_box")
    if not scaled and max(box) <= 1:
        box = [v * 1000 for v in box]
    if not ordered_box(box):
        raise Unscorable("reversed_box")
    return iou_continuous(box, truth) ** 2


def _first_box(text: str) -> list[float] | None:
    for shape in _BOXES:
        found = pattern(shape).search(text)
        if found:
            return [float(number) for number in found.groups()]
    return None


def _corners(solution: Any) -> Any:
    if isinstance(solution, str):
        try:
            solution = json.loads(solution.strip().replace("(", "[").replace(")", "]"))
        except ValueError as fault:
            raise BadColumn(f"solution: {fault}") from None
    return list(solution) if isinstance(solution, list | tuple) else solution


def _upstream_iou(a, b) -> float:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union


@reward("perception_r1/grounding_format", source=PR1)
def grounding_format(text: str, *, compat: str) -> float:
    """1 for `<|object_ref_start|>..<|object_ref_end|><|box_start|>..<|box_end|><|im_end|>`.

    Source: linkangheng/PR1@48d5558, `pr1_grounding_format_reward`. "upstream": the bars of the
    pattern are not escaped, so it is an alternation whose branches `^<`, `object_ref_start`,
    `>.*?<`, `object_ref_end`, `><`, `box_start`, `box_end`, `im_end`, `>` match at the start of
    almost any text. "fixed": the tokens in order, from the start to the end of the text.
    """
    text = text.replace("<|endoftext|>", "")
    if compat == "upstream":
        starts = ("<", "object_ref_start", "object_ref_end", "box_start", "box_end", "im_end", ">")
        return float(text.startswith(starts))
    whole = (
        r"<\|object_ref_start\|>.*?<\|object_ref_end\|>"
        r"<\|box_start\|>.*?<\|box_end\|>(?:<\|im_end\|>)?"
    )
    return float(pattern(whole).fullmatch(text.strip()) is not None)


@reward("perception_r1/accuracy", columns=("solution",), verifies=True, source=XIAO)
def accuracy(text: str, *, solution, compat: str) -> float:
    """1 when math-verify finds the answer equal to the solution.

    Source: tongxiao2002/Perception-R1@c47eaf2, `boxed_math_verify_accuracy_reward`. "upstream":
    an answer of several lines is not recognised as one and the whole text is read. "fixed": it is.
    """
    if compat == "upstream":
        said = one_line_answer(text)
    else:
        content = answer(text, last=True)
        said = (text if content is None else content).strip()
        if len(said) > MAX_ANSWER:
            raise Unscorable("answer_too_long")
    return float(math_pool.equal(str(solution).strip(), said).equal)


_FORMAT = r"<think>\n.*?\n</think>\n<answer>\n.*?\\boxed\{.+?\}.*?\n</answer>"


@reward("perception_r1/format", source=XIAO)
def boxed_format(text: str, *, perception: bool = False, compat: str) -> float:
    r"""1 for think and answer blocks on their own lines with a `\boxed{}` in the answer.

    `perception=True` wants a perception block before. Source:
    tongxiao2002/Perception-R1@c47eaf2, `boxed_math_verify_format_reward`. "fixed" equals
    "upstream" but allows blanks around the text.
    """
    whole = (r"<perception>\n.*?\n</perception>\n" if perception else "") + _FORMAT
    text = text if compat == "upstream" else text.strip()
    return float(pattern(whole).fullmatch(text) is not None)


@reward("perception_r1/ngram_penalty", range=(-2.0, 0.0), fallback=-2.0, source=XIAO)
def ngram_penalty(
    text: str, *, ngram_size: int = 20, ngram_max_penalty: float = -2.0, compat: str
) -> float:
    """(1 - distinct / all n-grams of the lower-case words) * `ngram_max_penalty`.

    Source: tongxiao2002/Perception-R1@c47eaf2, `ngram_penalty_reward`; the released script uses
    n = 20. "fixed" equals "upstream" on the last 16,384 characters.
    """
    text = text if compat == "upstream" else text[-MAX_REPEATED:]
    penalty = ngram_repetition(text.lower().split(), ngram_size) * ngram_max_penalty
    return penalty if compat == "upstream" else max(penalty, -2.0)


@reward("perception_r1/visual", optional=("judge_output", "visual_key_info"), source=XIAO)
def visual(
    text: str,
    *,
    judge_output: str | None = None,
    visual_key_info: str | None = None,
    judge: Callable[[str, str], str] | None = None,
    compat: str,
) -> float:
    """Mean of the judge's 0/1 scores for the key facts of the image, sum / (n + 1e-6).

    The judgement `<info1>1</info1><info2>0</info2>...` is the row's `judge_output`, or
    `judge(text, visual_key_info)`; without either the reward is 0.

    Source: tongxiao2002/Perception-R1@c47eaf2, `batch_visual_key_info_reward`. "upstream": reads
    up to the first missing number. "fixed": divides by n, and the scores must be numbers.
    """
    if judge_output is None and judge is not None and visual_key_info:
        judge_output = judge(text, visual_key_info)
    if not judge_output:
        return 0.0
    scores = visual_scores(judge_output)
    if compat == "upstream":
        return sum(scores) / (len(scores) + 1e-6)
    return sum(scores) / max(len(scores), 1)


def visual_scores(judgement: str) -> list[float]:
    """The numbers in the last `<infoK>` of each K = 1, 2, ..., clipped to [0, 1], text is 0."""
    judgement, scores = judgement[:MAX_JUDGEMENT], []
    while len(scores) < 1000:
        tag = f"info{len(scores) + 1}>"
        found = _last_between(judgement, "<" + tag, "</" + tag)
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
    compat: str,
) -> float:
    """0.9 accuracy + 0.1 format + 0.7 visual + n-gram penalty.

    Source: tongxiao2002/Perception-R1@c47eaf2, `CustomRewardManager`. Modes as the parts.
    """
    score = 0.9 * accuracy(text, solution=solution, compat=compat)
    score += 0.1 * boxed_format(text, compat=compat)
    seen = visual(
        text,
        judge_output=judge_output,
        visual_key_info=visual_key_info,
        judge=judge,
        compat=compat,
    )
    penalty = ngram_penalty(text, compat=compat) if use_ngram_penalty else 0.0
    return score + visual_factor * seen + penalty
