# SPDX-License-Identifier: Apache-2.0
"""`perception_r1` as published: PR1 (linkangheng/PR1@48d5558), Xiao et al. (@c47eaf2)."""

from __future__ import annotations

from collections.abc import Callable

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.tags import SPACE, one_line_answer, pattern
from fastgrpo.rewards.read.words import ngram_repetition
from fastgrpo.rewards.systems import perception_r1 as fixed

_FLOAT = r"(-?\p{Nd}+(?:\.\p{Nd}+)?)"
_BLANK = rf"{SPACE}*"
_BOXES = (
    rf"\[{_BLANK}{_FLOAT},{_BLANK}{_FLOAT},{_BLANK}{_FLOAT},{_BLANK}{_FLOAT}{_BLANK}\]",
    rf"\({_BLANK}{_FLOAT},{_BLANK}{_FLOAT},{_BLANK}{_FLOAT},{_BLANK}{_FLOAT}{_BLANK}\)",
    rf"\({_BLANK}{_FLOAT},{_BLANK}{_FLOAT}\),{_BLANK}\({_BLANK}{_FLOAT},{_BLANK}{_FLOAT}\)",
)


@published(fixed.grounding)
def grounding(text: str, *, solution) -> float:
    """Two empty boxes divide by zero, reversed ones have areas of either sign."""
    text = text.replace("<|endoftext|>", "")
    said = _first_box(text) or [0, 0, 0, 0]
    said = said if "<|box_start|>" in text else [int(v * 1000) for v in said]
    return _iou(said, fixed.corners(solution)) ** 2


def _first_box(text: str) -> list[float] | None:
    for shape in _BOXES:
        found = pattern(shape).search(text)
        if found:
            return [float(number) for number in found.groups()]
    return None


def _iou(a, b) -> float:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


@published(fixed.grounding_format)
def grounding_format(text: str) -> float:
    """The alternation that the unescaped bars make of the pattern."""
    starts = ("<", "object_ref_start", "object_ref_end", "box_start", "box_end", "im_end", ">")
    return float(text.replace("<|endoftext|>", "").startswith(starts))


@published(fixed.accuracy)
def accuracy(text: str, *, solution) -> float:
    """Of the first answer on one line, or the whole text."""
    return float(math_pool.equal(str(solution).strip(), one_line_answer(text)).equal)


@published(fixed.boxed_format)
def boxed_format(text: str, *, perception: bool = False) -> float:
    """No blanks around the text."""
    return fixed.boxed_blocks(text, perception)


@published(fixed.ngram_penalty)
def ngram_penalty(text: str, *, ngram_size: int = 20, ngram_max_penalty: float = -2.0) -> float:
    """Of the whole text."""
    return ngram_repetition(text.lower().split(), ngram_size) * ngram_max_penalty


@published(fixed.visual)
def visual(
    text: str,
    *,
    judge_output: str | None = None,
    visual_key_info: str | None = None,
    judge: Callable[[str, str], str] | None = None,
) -> float:
    """Divided by n + 1e-6."""
    scores = fixed.visual_scores(fixed.judgement(text, judge_output, visual_key_info, judge))
    return sum(scores) / (len(scores) + 1e-6)


@published(fixed.total)
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
    """The same sum of the published parts."""
    seen = visual(text, judge_output=judge_output, visual_key_info=visual_key_info, judge=judge)
    score = 0.9 * accuracy(text, solution=solution) + 0.1 * boxed_format(text)
    return score + visual_factor * seen + (ngram_penalty(text) if use_ngram_penalty else 0.0)
