# SPDX-License-Identifier: Apache-2.0
"""`vlm_r1_answers` as published (om-ai-lab/VLM-R1@90052f4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.mathematics import numbers_equal
from fastgrpo.rewards.read.tags import answer_or_all, last_answer, one_line_answer, pattern
from fastgrpo.rewards.read.words import clean_text, ngram_repetition
from fastgrpo.rewards.systems import vlm_r1_answers as fixed
from fastgrpo.rewards.systems.vlm_r1_detection_upstream import (
    published_map,
    published_od,
    published_weighted_sum,
)

_KEYWORDS = (
    "答案 选择 正确 是 对 ANSWER CORRECT CHOOSE SELECT RIGHT 认为 应该 觉得 THINK BELIEVE SHOULD"
).split()
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def extract_choice(text: str) -> str | None:
    """A capital of the upper-cased text with no capital before it and one of `.,?!:;` or the end
    after it; of several the one with the best surroundings.
    """
    text = _single_spaces(text.upper())
    found: dict[str, int] = {}
    for i, char in enumerate(text):
        if char in _LETTERS and text[i + 1 : i + 2] in ".,?!:;":
            if i == 0 or text[i - 1] not in _LETTERS:
                found[char] = found.get(char, 0) + 1
    if len(found) <= 1:
        return next(iter(found), None)
    scores = {char: times * _surroundings(text, char) for char, times in found.items()}
    return max(scores, key=scores.__getitem__)


def _surroundings(text: str, char: str) -> int:
    position = text.find(char)
    context = text[max(0, position - 20) : position + 20]
    score = sum(word in context for word in _KEYWORDS)
    score += 2 * (position > len(text) * 0.7)
    return score + (position < len(text) - 1 and text[position + 1] in "。.!！,，")


def _single_spaces(text: str) -> str:
    words = " ".join(text.split())
    if not words:
        return " " if text else ""
    return " " * text[0].isspace() + words + " " * text[-1].isspace()


@published(fixed.mcq)
def mcq(text: str, *, solution: str) -> float:
    """The letter with the best surroundings; the whole solution where it has none."""
    truth, said = one_line_answer(solution), answer_or_all(text).strip()
    return float(extract_choice(said) == (extract_choice(truth) or solution.strip()))


@published(fixed.yes_no)
def yes_no(text: str, *, solution: str) -> float:
    """The first "yes" or "no" as a substring; neither equals neither."""
    truth, said = one_line_answer(solution.lower()), answer_or_all(text.lower())
    truth, said = (pattern("yes|no").search(side) for side in (truth, said))
    return float((truth and truth.group()) == (said and said.group()))


@published(fixed.all_match)
def all_match(text: str, *, solution: str) -> float:
    """Equality of the cleaned texts."""
    return float(clean_text(text) == clean_text(solution))


@published(fixed.math_reward)
def math_reward(text: str, *, solution: str) -> float:
    """As repaired, without the cap."""
    return fixed.cleaned_equal(clean_text(text), clean_text(solution))


@published(fixed.default_accuracy)
def default_accuracy(text: str, *, solution: str) -> float:
    """math-verify, then numbers where the solution has a digit, then the choice, then the ratio."""
    truth, said = one_line_answer(solution), last_answer(text).strip()
    if math_pool.equal(said, truth).equal:
        return 1.0
    said_clean, truth_clean = clean_text(said), clean_text(truth)
    if pattern(r"\p{Nd}").search(truth):
        equal = numbers_equal(said_clean, truth_clean)
        return fixed.ratio(said_clean, truth_clean) if equal is None else float(equal)
    choice = extract_choice(truth)
    if choice:
        return float(extract_choice(said) == choice)
    return fixed.ratio(said_clean, truth_clean)


@published(fixed.llm)
def llm(text: str, *, solution: str, judge: Callable[[str, str], float] | None = None) -> float:
    """As repaired, without the cap; a solution of several lines keeps its tags."""
    return fixed.judged(last_answer(text).strip(), one_line_answer(solution), judge)


@published(fixed.cosine_length)
def cosine_length(
    text: str, *, completion_ids=None, acc_reward=None, tokenizer: Any = None,
    max_length: int = 1024,
) -> float:  # fmt: skip
    """The curve of right answers, which rises again beyond `max_length`, whatever `acc_reward`."""
    return fixed.cosine(fixed.num_tokens(text, completion_ids, tokenizer), max_length, 0.5, 1.0)


@published(fixed.cosine_accuracy)
def cosine_accuracy(
    text: str, *, completion_ids=None, tokenizer: Any = None, max_length: int = 1024
) -> float:
    """`cosine_length`."""
    return cosine_length(
        text, completion_ids=completion_ids, tokenizer=tokenizer, max_length=max_length
    )


@published(fixed.repetition)
def repetition(text: str) -> float:
    """Broken JSON is repaired by json_repair; words are split at blanks."""
    items = fixed.listed_boxes(_load_repaired(fixed.listed_block(text)))
    if items is not None:
        return -ngram_repetition(items, 1) if items else 0.0
    return -ngram_repetition(text.lower().split(), 6)


def _load_repaired(block: str) -> Any:
    try:
        return json.loads(block)
    except (ValueError, RecursionError):
        pass
    if not block or len(block) > 16384:  # json_repair needs seconds for more
        return None
    from json_repair import repair_json

    try:
        return json.loads(repair_json(block))
    except (ValueError, RecursionError):
        return None


_METHODS = {
    "mcq": mcq,
    "yes_no": yes_no,
    "math": math_reward,
    "all_match": all_match,
    "map": published_map,
    "weighted_sum": published_weighted_sum,
    "od_ap": published_od,
}


@published(fixed.accuracy)
def accuracy(
    text: str,
    *,
    solution: str,
    accu_reward_method: str | None = None,
    judge: Callable[[str, str], float] | None = None,
) -> float:
    """The published reward that the row names."""
    if accu_reward_method == "llm":
        return llm(text, solution=solution, judge=judge)
    if accu_reward_method in ("od_ap50", "odLength"):
        length = accu_reward_method == "odLength"
        return published_od(text, solution=solution, score_type=int(not length), length=length)
    return _METHODS.get(accu_reward_method, default_accuracy)(text, solution=solution)
