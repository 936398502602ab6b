# SPDX-License-Identifier: Apache-2.0
"""VLM-R1's rewards for answers in words, and its row-wise choice of reward (VLM-R1@90052f4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.guard import guarded, verified
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import detection_truth, thought
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.choices import read_options, same_choice
from fastgrpo.rewards.read.faults import BadColumn, Unscorable, short
from fastgrpo.rewards.read.items import MAX_BOXES, MAX_JSON, loads
from fastgrpo.rewards.read.mathematics import boxed, numbers_equal, same_latex
from fastgrpo.rewards.read.tags import answer_or_all, between, fenced_json, last_answer, pattern
from fastgrpo.rewards.read.words import clean_text, ngram_repetition
from fastgrpo.rewards.systems.vlm_r1 import SOURCE
from fastgrpo.rewards.systems.vlm_r1_detection import map_reward, od_reward, weighted_sum

MAX_REPEATED = 1 << 14


def ratio(a: str, b: str) -> float:
    """2 * matching characters / (sum of lengths)."""
    from rapidfuzz.distance import Indel

    return Indel.normalized_similarity(a, b)


def solution_text(solution: Any) -> str:
    """A solution of text or a number as text."""
    if isinstance(solution, bool) or not isinstance(solution, str | int | float):
        raise BadColumn("solution is not text")
    return str(solution)


def _said(text: str) -> str:
    return short(last_answer(text).strip())


def _truth(*, solution, **columns) -> str:
    return thought(last_answer(solution_text(solution)).strip())


@reward("vlm_r1/mcq", columns=("solution",), optional=("options", "choices", "problem"),
        source=SOURCE, truth=_truth)  # fmt: skip
def mcq(text: str, *, solution, options=None, choices=None, problem=None) -> float:
    """1 when the first `<answer>` (or the whole text) chooses the options that the solution does.

    `read.choices` says where a letter is one. With the column `options` or `choices`, or options in
    the lines of `problem`, the text of an option counts as its letter.

    Source: om-ai-lab/VLM-R1@90052f4, `mcq_reward`. "upstream": the capital before `.,?!:;` or the
    end with the best surroundings, so "(B)" and "C。" have none. "fixed": letters that are choices;
    several are compared as sets.
    """
    known = read_options(options if options is not None else choices, problem)
    same = same_choice(answer_or_all(text), solution, known)
    if same is None:
        raise BadColumn("solution chooses no option")
    return float(same)


@reward("vlm_r1/yes_no", columns=("solution",), source=SOURCE, truth=_truth)
def yes_no(text: str, *, solution) -> float:
    """1 when the first yes or no of the first `<answer>` (or of the text) is the solution's.

    Source: om-ai-lab/VLM-R1@90052f4, `yes_no_reward`. "upstream": substrings count ("not" is no,
    "yesterday" is yes) and neither on both sides gives 1. "fixed": whole words only, and an answer
    without one gives 0.
    """
    sides = answer_or_all(text.lower()), last_answer(solution_text(solution).lower())
    said, truth = (pattern(r"\b(?:yes|no)\b").search(short(side.strip())) for side in sides)
    if truth is None:
        raise BadColumn("solution is neither yes nor no")
    return float(said is not None and said.group() == truth.group())


@reward("vlm_r1/all_match", columns=("solution",), source=SOURCE, truth=_truth)
def all_match(text: str, *, solution) -> float:
    """1 when answer and solution are equal after cleaning (last answer, one line, lower case).

    Source: om-ai-lab/VLM-R1@90052f4, `all_match_reward`. "fixed" equals "upstream" except that
    runs of blanks count as one and answers beyond 8,192 characters give 0.
    """
    truth = clean_text(solution_text(solution))
    return float(clean_text(_said(text)).split() == truth.split())


@reward("vlm_r1/math", columns=("solution",), source=SOURCE, verifies=True, truth=_truth)
def math_reward(text: str, *, solution) -> float:
    """1 when the cleaned answer equals the solution as text, by math-verify, or as boxed LaTeX.

    Source: om-ai-lab/VLM-R1@90052f4, `math_reward`. The verification runs in a process with
    time and memory limits; when they are exceeded the answers count as different. "fixed" equals
    "upstream" but for the cap of 8,192 characters.
    """
    return cleaned_equal(clean_text(_said(text)), clean_text(solution_text(solution)))


def cleaned_equal(said: str, truth: str) -> float:
    """1 for cleaned answers that are equal as text, mathematically, or as boxed LaTeX."""
    if said == truth or math_pool.equal(said, truth).equal:
        return 1.0
    inner = boxed(said)
    return float(same_latex(said if inner is None else inner, truth))


@reward("vlm_r1/default", columns=("solution",), optional=("options", "choices", "problem"),
        source=SOURCE, verifies=True, truth=_truth)  # fmt: skip
def default_accuracy(text: str, *, solution, options=None, choices=None, problem=None) -> float:
    """1 by math-verify; else the same choice, equal numbers, or the Levenshtein ratio.

    A solution that is an option's letter, alone or before its text, wants the same choice (as
    `vlm_r1/mcq`). If it has a digit: exact equality of numbers, or the ratio where one side is no
    number. Else the ratio of the cleaned texts, 2 * matches / (sum of lengths).

    Source: om-ai-lab/VLM-R1@90052f4, `default_accuracy_reward`. "upstream": tags of a solution
    of several lines are not recognised and become part of the text compared, digits come before
    choices, and choices are read as in `vlm_r1/mcq`. "fixed": none of these.
    """
    solution = solution_text(solution)
    truth, said = short(last_answer(solution).strip()), _said(text)
    if math_pool.equal(said, truth).equal:
        return 1.0
    known = read_options(options if options is not None else choices, problem)
    same = same_choice(said, truth, known, strict=True)
    if same is not None:
        return float(same)
    return by_digits_or_ratio(clean_text(said), clean_text(truth))


def by_digits_or_ratio(said: str, truth: str) -> float:
    """Equality of numbers where the solution has a digit and both are some, else the ratio."""
    equal = numbers_equal(said, truth) if pattern(r"\p{Nd}").search(truth) else None
    return ratio(said, truth) if equal is None else float(equal)


@reward("vlm_r1/llm", columns=("solution",), source=SOURCE, truth=_truth)
def llm(text: str, *, solution, judge: Callable[[str, str], float] | None = None):
    """`judge(answer, solution)` in [0, 1] of the last `<answer>`; exact equality without a judge.

    Source: om-ai-lab/VLM-R1@90052f4, `llm_reward`, whose judge is a chat model asked for 1.0 or
    0.0 at temperature 0. A judge that raises OSError, ValueError or TimeoutError falls back to
    exact equality, as there.
    """
    return judged(_said(text), short(last_answer(solution_text(solution)).strip()), judge)


def judged(said: str, truth: str, judge: Callable[[str, str], float] | None) -> float:
    """The judge's score, or equality where there is none or it fails."""
    if judge is not None:
        try:
            return float(judge(said, truth))
        except (OSError, ValueError, TimeoutError):
            pass
    return float(said == truth)


@reward(
    "vlm_r1/length",
    optional=("completion_ids", "acc_reward"),
    range=(-0.5, 1.0),
    upstream_range=(0.5, 1.0),
    source=SOURCE,
    presets={"vlm_r1/cosine": {}},
)
def cosine_length(
    text: str,
    *,
    completion_ids=None,
    acc_reward: float | None = None,
    tokenizer: Any = None,
    max_length: int = 1024,
) -> float:
    """A cosine from 1 at length 0 to 0.5 at `max_length` tokens, from 0 to -0.5 for wrong answers.

    at_zero - (at_zero - at_max) (1 - cos(pi L / max_length)) / 2, where L is the number of
    `completion_ids` or of `tokenizer.encode(text)`. An answer is wrong when the row's `acc_reward`
    is below 0.7; without that column all are right.

    Source: om-ai-lab/VLM-R1@90052f4, `cosine_reward`. "upstream": the accuracy is overwritten
    with 1, so wrong answers get the curve of right ones, and the curve rises again beyond
    `max_length`. "fixed": neither.
    """
    length = min(num_tokens(text, completion_ids, tokenizer), max_length)
    wrong = acc_reward is not None and acc_reward < 0.7
    return cosine(length, max_length, *((-0.5, 0.0) if wrong else (0.5, 1.0)))


def num_tokens(text: str, completion_ids, tokenizer) -> int:
    """Tokens of a completion, by its ids or else by a tokenizer."""
    if completion_ids is not None:
        return len(completion_ids)
    if tokenizer is None:
        raise InputError("vlm_r1/length: needs the column 'completion_ids' or a tokenizer")
    return len(tokenizer.encode(text))


def cosine(length: int, max_length: int, at_max: float, at_zero: float) -> float:
    """A half period of a cosine from `at_zero` to `at_max`."""
    return at_zero - (at_zero - at_max) * (1 - math.cos(length * math.pi / max_length)) / 2


@reward("vlm_r1/cosine_accuracy", columns=("solution",), optional=("completion_ids",),
        range=(-0.5, 1.0), upstream_range=(0.5, 1.0), source=SOURCE, batched=True,
        framed=True)  # fmt: skip
def cosine_accuracy(
    texts, note, *, solution, frames, completion_ids=None, tokenizer: Any = None,
    max_length: int = 1024,
):  # fmt: skip
    """The cosine length reward with the branch for wrong answers that VLM-R1 intended.

    Right (weighted sum >= 0.7): from 1 at length 0 to 0.5; wrong: from 0 to -0.5.

    Source: om-ai-lab/VLM-R1@90052f4, `cosine_rewards`. "upstream" is `vlm_r1/length`, where the
    wrong branch cannot be reached; "fixed" uses it.
    """
    ids = completion_ids or [None] * len(texts)
    lengths = [num_tokens(t, one, tokenizer) for t, one in zip(texts, ids, strict=True)]
    scores = weighted_sum(texts, note, solution=solution, frames=frames)
    branches = [(0.5, 1.0) if s is not None and s >= 0.7 else (-0.5, 0.0) for s in scores]
    return [
        None if s is None else cosine(min(n, max_length), max_length, *branch)
        for s, n, branch in zip(scores, lengths, branches, strict=True)
    ]


@reward("vlm_r1/repetition", range=(-1.0, 0.0), source=SOURCE)
def repetition(text: str) -> float:
    """-(1 - distinct / all): boxes with labels of a JSON list, else 6-grams of the words.

    Source: om-ai-lab/VLM-R1@90052f4, `repetition_reward`. "upstream": the first fenced block, any
    fence, or an array of boxes is repaired by json_repair when it is no JSON; words are split at
    blanks, so Chinese text is never penalised. "fixed": truncated JSON is cut after its last
    complete item instead of repaired, text without blanks counts characters as words, and of
    longer text the last 16,384 characters or 1,000 items count.
    """
    items = listed_boxes(_load_complete_items(listed_block(text)), MAX_BOXES)
    if items is not None:
        return -ngram_repetition(items, 1) if items else 0.0
    text = text[-MAX_REPEATED:]
    words = text.lower().split()
    if len(text) > 12 * max(len(words), 1):
        words = "".join(words)
    return -ngram_repetition(words, 6)


def listed_block(text: str) -> str:
    """The first fenced block that may hold boxes, or the first array of them; "" without one."""
    block = fenced_json(text)
    if block is None:
        block = between(text, "```", "```")
        if not (block or "").strip():
            block = _box_array(text)
    return (block or "").strip()


def _box_array(text: str) -> str | None:
    """From the first `[ {` after which "bbox_2d", "label" and `} ]` follow, to that end."""
    found = pattern(r'\[\s*\{.*?"bbox_2d".*?"label".*?\}\s*\]').search(text)
    return found.group() if found else None


def listed_boxes(data: Any, limit: int | None = None) -> list[str] | None:
    """ "box_label" of the last `limit` items, or None when the data are no list of items."""
    if not data or not isinstance(data, list):
        return None
    return [
        f"{item['bbox_2d']}_{item['label']}"
        for item in data[-(limit or len(data)) :]
        if "bbox_2d" in item and "label" in item
    ]


def _load_complete_items(block: str) -> Any:
    if not block:
        return None
    try:
        return loads(block)
    except Unscorable:
        end = block.rfind("}")
        if end < 0 or len(block) > MAX_JSON:
            return None
    try:
        return loads(block[: end + 1].rstrip() + "]")
    except Unscorable:
        return None


_ROW_WISE = {"mcq": mcq, "yes_no": yes_no, "math": math_reward, "all_match": all_match, "llm": llm}
_BATCHED = {
    "map": (map_reward, {}),
    "weighted_sum": (weighted_sum, {}),
    "od_ap": (od_reward, {}),
    "od_ap50": (od_reward, {"score_type": 1}),
    "odLength": (od_reward, {"length": True}),
}


def _method_truth(*, solution, frames, accu_reward_method=None, **columns) -> str:
    if accu_reward_method in _BATCHED:
        return detection_truth(solution=solution, frames=frames)
    return _truth(solution=solution)


@reward("vlm_r1/accuracy", columns=("solution",),
        optional=("accu_reward_method", "options", "choices", "problem"),
        upstream_range=(-1.0, 1.0), source=SOURCE, batched=True, framed=True,
        truth=_method_truth)  # fmt: skip
def accuracy(
    texts,
    note,
    *,
    solution,
    frames,
    accu_reward_method=None,
    options=None,
    choices=None,
    problem=None,
    judge: Callable[[str, str], float] | None = None,
):
    """The reward each row names in `accu_reward_method`.

    mcq, yes_no, llm, map, math, weighted_sum, od_ap, od_ap50, odLength, all_match; any other name,
    None or no column is "default".

    Source: om-ai-lab/VLM-R1@90052f4, `accuracy_reward`. Both modes as the reward chosen.
    """
    methods = accu_reward_method if accu_reward_method is not None else [None] * len(texts)
    values: list[float | None] = [None] * len(texts)
    asked = {"options": options, "choices": choices, "problem": problem}
    asked = {key: column for key, column in asked.items() if column is not None}
    for name in dict.fromkeys(methods):
        rows = [i for i, method in enumerate(methods) if method == name]
        chosen, truth = [texts[i] for i in rows], [solution[i] for i in rows]
        if name in _BATCHED:
            score, settings = _BATCHED[name]
            own = [frames[i] for i in rows]
            scores = score(chosen, note, solution=truth, frames=own, **settings)
        else:
            columns = {key: [column[i] for i in rows] for key, column in asked.items()}
            scores = _row_scores(name, chosen, note, {"solution": truth, **columns}, judge)
        for i, value in zip(rows, scores, strict=True):
            values[i] = value
    return values


def _row_scores(name, texts, note, columns, judge) -> list[float | None]:
    score = _ROW_WISE.get(name, default_accuracy)
    if score not in (mcq, default_accuracy):
        columns = {"solution": columns["solution"]}
    row_wise = verified if score in (math_reward, default_accuracy) else guarded
    return row_wise(score, texts, note, columns, {"judge": judge} if score is llm else {}, 0.0)
