"""VLM-R1's rewards for answers in words, and its row-wise choice of reward (VLM-R1@90052f4)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards import math_pool
from fastgrpo.rewards.detection import MAX_BOXES
from fastgrpo.rewards.math_answers import boxed, numbers_equal, same_latex
from fastgrpo.rewards.registry import BadColumn, Unscorable, guarded, reward, verified
from fastgrpo.rewards.text import (
    MAX_JSON,
    answer,
    between,
    clean_text,
    extract_choice,
    fenced_json,
    loads,
    ngram_repetition,
    one_line_answer,
    pattern,
)
from fastgrpo.rewards.vlm_r1 import SOURCE
from fastgrpo.rewards.vlm_r1_detection import map_reward, od_reward, weighted_sum

MAX_REPEATED = 1 << 14
# An answer is a few words; a longer one is not worth a quadratic comparison.
MAX_ANSWER = 8192


def _ratio(a: str, b: str) -> float:
    from rapidfuzz.distance import Indel

    return Indel.normalized_similarity(a, b)


def _short(text: str) -> str:
    if len(text) > MAX_ANSWER:
        raise Unscorable("answer_too_long")
    return text


def _text_solution(solution: Any, upstream: bool) -> str:
    if upstream:
        return solution
    if isinstance(solution, bool) or not isinstance(solution, str | int | float):
        raise BadColumn("solution is not text")
    return str(solution)


def _tagged(text: str, upstream: bool, *, last: bool = False) -> str:
    content = answer(text, last=last)
    content = (text if content is None else content).strip()
    return content if upstream else _short(content)


def _truth(solution: str, upstream: bool) -> str:
    """ "upstream" reads the solution's tags only when they are on one line."""
    return one_line_answer(solution) if upstream else _tagged(solution, upstream, last=True)


@reward("vlm_r1/mcq", columns=("solution",), source=SOURCE)
def mcq(text: str, *, solution, compat: str) -> float:
    """1 when the choice letter of the first `<answer>` (or of the whole text) is the solution's.

    Source: om-ai-lab/VLM-R1@90052f4, `mcq_reward`. "upstream": a letter counts only before
    `.,?!:;` or the end, so "(B)" and "C。" have none. "fixed": a letter A-Z that is not part of a
    word or number, upper case unless it stands alone; the last one of the answer.
    """
    upstream = compat == "upstream"
    solution = _text_solution(solution, upstream)
    truth, said = _truth(solution, upstream), _tagged(text, upstream)
    if upstream:
        right = extract_choice(truth)
        return float(extract_choice(said) == (right or solution.strip()))
    right = lone_letter(truth)
    if right is None:
        raise BadColumn("solution has no choice letter")
    return float(lone_letter(said) == right)


def lone_letter(text: str) -> str | None:
    """The last letter that stands alone; a small one only when the whole text is that letter."""
    stripped = text.strip("().[]{}:;,!。 \t\r\n$*")
    if len(stripped) == 1 and stripped.isascii() and stripped.isalpha():
        return stripped.upper()
    for i in range(len(text) - 1, -1, -1):
        if text[i] in _LETTERS and not (_joins(text[i - 1 : i]) or _joins(text[i + 1 : i + 2])):
            return text[i]
    return None


_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _joins(char: str) -> bool:
    """Whether the character makes its neighbour part of a word or number."""
    return char.isascii() and (char.isalnum() or char in ("_", "'"))


@reward("vlm_r1/yes_no", columns=("solution",), source=SOURCE)
def yes_no(text: str, *, solution, compat: str) -> float:
    """1 when the first yes or no of the first `<answer>` (or of the text) is the solution's.

    Source: om-ai-lab/VLM-R1@90052f4, `yes_no_reward`. "upstream": substrings count ("not" is no,
    "yesterday" is yes) and neither on both sides gives 1. "fixed": whole words only, and an answer
    without one gives 0.
    """
    upstream = compat == "upstream"
    solution = _text_solution(solution, upstream).lower()
    truth, said = _truth(solution, upstream), _tagged(text.lower(), upstream)
    wanted = "yes|no" if upstream else r"\b(?:yes|no)\b"
    truth, said = (pattern(wanted).search(side) for side in (truth, said))
    if upstream:
        return float((truth and truth.group()) == (said and said.group()))
    if truth is None:
        raise BadColumn("solution is neither yes nor no")
    return float(said is not None and said.group() == truth.group())


@reward("vlm_r1/all_match", columns=("solution",), source=SOURCE)
def all_match(text: str, *, solution, compat: str) -> float:
    """1 when answer and solution are equal after cleaning (last answer, one line, lower case).

    Source: om-ai-lab/VLM-R1@90052f4, `all_match_reward`. "fixed" equals "upstream" except that
    runs of blanks count as one and answers beyond 8,192 characters give 0.
    """
    if compat == "upstream":
        return float(clean_text(text) == clean_text(solution))
    said = _short(_tagged(text, False, last=True))
    truth = clean_text(_text_solution(solution, False))
    return float(clean_text(said).split() == truth.split())


@reward("vlm_r1/math", columns=("solution",), source=SOURCE, verifies=True)
def math_reward(text: str, *, solution, compat: str) -> float:
    """1 when the cleaned answer equals the solution as text, by math-verify, or as boxed LaTeX.

    Source: om-ai-lab/VLM-R1@90052f4, `math_reward`. The verification runs in a process with
    time and memory limits; when they are exceeded the answers count as different. "fixed" equals
    "upstream" but for the cap of 8,192 characters.
    """
    upstream = compat == "upstream"
    solution = _text_solution(solution, upstream)
    said = clean_text(text if upstream else _tagged(text, False, last=True))
    truth = clean_text(solution)
    if said == truth:
        return 1.0
    if math_pool.equal(said, truth).equal:
        return 1.0
    inner = boxed(said)
    return float(same_latex(said if inner is None else inner, truth))


@reward("vlm_r1/default", columns=("solution",), source=SOURCE, verifies=True)
def default_accuracy(text: str, *, solution, compat: str) -> float:
    """1 by math-verify; else equal numbers, the choice letter, or the Levenshtein ratio.

    If the solution has a digit: exact equality of numbers, or the ratio where one side is no
    number. If it has a choice letter: equality of letters. Else the ratio of the cleaned texts,
    2 * matches / (sum of lengths).

    Source: om-ai-lab/VLM-R1@90052f4, `default_accuracy_reward`. "upstream": tags of a solution
    of several lines are not recognised and become part of the text compared. "fixed": they are.
    """
    upstream = compat == "upstream"
    solution = _text_solution(solution, upstream)
    truth, said = _truth(solution, upstream), _tagged(text, upstream, last=True)
    if math_pool.equal(said, truth).equal:
        return 1.0
    said_clean, truth_clean = clean_text(said), clean_text(truth)
    if pattern(r"\p{Nd}").search(truth):
        equal = numbers_equal(said_clean, truth_clean)
        return _ratio(said_clean, truth_clean) if equal is None else float(equal)
    choice = extract_choice(truth)
    if choice:
        return float(extract_choice(said) == choice)
    return _ratio(said_clean, truth_clean)


@reward("vlm_r1/llm", columns=("solution",), source=SOURCE)
def llm(text: str, *, solution, judge: Callable[[str, str], float] | None = None, compat: str):
    """`judge(answer, solution)` in [0, 1] of the last `<answer>`; exact equality without a judge.

    Source: om-ai-lab/VLM-R1@90052f4, `llm_reward`, whose judge is a chat model asked for 1.0 or
    0.0 at temperature 0. A judge that raises OSError, ValueError or TimeoutError falls back to
    exact equality, as there.
    """
    upstream = compat == "upstream"
    solution = _text_solution(solution, upstream)
    truth, said = _truth(solution, upstream), _tagged(text, upstream, last=True)
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
    compat: str,
) -> float:
    """A cosine from 1 at length 0 to 0.5 at `max_length` tokens, from 0 to -0.5 for wrong answers.

    at_zero - (at_zero - at_max) (1 - cos(pi L / max_length)) / 2, where L is the number of
    `completion_ids` or of `tokenizer.encode(text)`. An answer is wrong when the row's `acc_reward`
    is below 0.7; without that column all are right.

    Source: om-ai-lab/VLM-R1@90052f4, `cosine_reward`. "upstream": the accuracy is overwritten
    with 1, so wrong answers get the curve of right ones, and the curve rises again beyond
    `max_length`. "fixed": neither.
    """
    length = _num_tokens(text, completion_ids, tokenizer)
    if compat == "upstream":
        return _cosine(length, max_length, 0.5, 1.0)
    wrong = acc_reward is not None and acc_reward < 0.7
    return _cosine(min(length, max_length), max_length, *((-0.5, 0.0) if wrong else (0.5, 1.0)))


def _num_tokens(text: str, completion_ids, tokenizer) -> int:
    if completion_ids is not None:
        return len(completion_ids)
    if tokenizer is None:
        raise InputError("vlm_r1/length: needs the column 'completion_ids' or a tokenizer")
    return len(tokenizer.encode(text))


def _cosine(length: int, max_length: int, at_max: float, at_zero: float) -> float:
    return at_zero - (at_zero - at_max) * (1 - math.cos(length * math.pi / max_length)) / 2


@reward("vlm_r1/cosine_accuracy", columns=("solution",), optional=("completion_ids",),
        range=(-0.5, 1.0), upstream_range=(0.5, 1.0), source=SOURCE, batched=True)  # fmt: skip
def cosine_accuracy(
    texts, note, *, solution, completion_ids=None, tokenizer: Any = None, max_length: int = 1024,
    compat: str,
):  # fmt: skip
    """The cosine length reward with the branch for wrong answers that VLM-R1 intended.

    Right (weighted sum >= 0.7): from 1 at length 0 to 0.5; wrong: from 0 to -0.5.

    Source: om-ai-lab/VLM-R1@90052f4, `cosine_rewards`. "upstream" is `vlm_r1/length`, where the
    wrong branch cannot be reached; "fixed" uses it.
    """
    lengths = [
        _num_tokens(text, None if completion_ids is None else completion_ids[i], tokenizer)
        for i, text in enumerate(texts)
    ]
    if compat == "upstream":
        return [_cosine(n, max_length, 0.5, 1.0) for n in lengths]
    scores = weighted_sum(texts, note, solution=solution, compat=compat)
    branches = [(0.5, 1.0) if s is not None and s >= 0.7 else (-0.5, 0.0) for s in scores]
    return [
        None if s is None else _cosine(min(n, max_length), max_length, *branch)
        for s, n, branch in zip(scores, lengths, branches, strict=True)
    ]


@reward("vlm_r1/repetition", range=(-1.0, 0.0), source=SOURCE)
def repetition(text: str, *, compat: str) -> float:
    """-(1 - distinct / all): boxes with labels of a JSON list, else 6-grams of the words.

    Source: om-ai-lab/VLM-R1@90052f4, `repetition_reward`. "upstream": the first fenced block, any
    fence, or an array of boxes is repaired by json_repair when it is no JSON; words are split at
    blanks, so Chinese text is never penalised. "fixed": truncated JSON is cut after its last
    complete item instead of repaired, text without blanks counts characters as words, and of
    longer text the last 16,384 characters or 1,000 items count.
    """
    items = _boxes_in(text, compat == "upstream")
    if items is not None:
        return -ngram_repetition(items, 1) if items else 0.0
    if compat == "fixed":
        text = text[-MAX_REPEATED:]
    words = text.lower().split()
    if compat == "fixed" and len(text) > 12 * max(len(words), 1):
        words = "".join(words)
    return -ngram_repetition(words, 6)


def _boxes_in(text: str, upstream: bool) -> list[str] | None:
    """ "box_label" of every item, or None when the text holds no JSON list of items."""
    block = fenced_json(text)
    if block is None:
        block = between(text, "```", "```")
        if not (block or "").strip():
            block = _box_array(text)
    if not (block or "").strip():
        return None
    data = _load_repaired(block.strip()) if upstream else _load_complete_items(block.strip())
    if not data or not isinstance(data, list):
        return None
    return [
        f"{item['bbox_2d']}_{item['label']}"
        for item in (data if upstream else data[-MAX_BOXES:])
        if "bbox_2d" in item and "label" in item
    ]


def _box_array(text: str) -> str | None:
    """From the first `[ {` after which "bbox_2d", "label" and `} ]` follow, to that end."""
    found = pattern(r'\[\s*\{.*?"bbox_2d".*?"label".*?\}\s*\]').search(text)
    return found.group() if found else None


def _load_repaired(block: str) -> Any:
    try:
        return json.loads(block)
    except (ValueError, RecursionError):
        pass
    if len(block) > 16384:  # json_repair needs seconds for more
        return None
    from json_repair import repair_json

    try:
        return json.loads(repair_json(block))
    except (ValueError, RecursionError):
        return None


def _load_complete_items(block: str) -> Any:
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


_METHODS = {"mcq": mcq, "yes_no": yes_no, "math": math_reward, "all_match": all_match}
_BATCHED = {
    "map": (map_reward, {}),
    "weighted_sum": (weighted_sum, {}),
    "od_ap": (od_reward, {}),
    "od_ap50": (od_reward, {"score_type": 1}),
    "odLength": (od_reward, {"length": True}),
}


@reward("vlm_r1/accuracy", columns=("solution",), optional=("accu_reward_method",),
        upstream_range=(-1.0, 1.0), source=SOURCE, batched=True)  # fmt: skip
def accuracy(
    texts,
    note,
    *,
    solution,
    accu_reward_method=None,
    judge: Callable[[str, str], float] | None = None,
    compat: str,
):
    """The reward each row names in `accu_reward_method`.

    mcq, yes_no, llm, map, math, weighted_sum, od_ap, od_ap50, odLength, all_match; any other name,
    None or no column is "default".

    Source: om-ai-lab/VLM-R1@90052f4, `accuracy_reward`. Both modes as the reward chosen.
    """
    methods = accu_reward_method if accu_reward_method is not None else ["default"] * len(texts)
    values: list[float | None] = [None] * len(texts)
    for name in dict.fromkeys(methods):
        rows = [i for i, method in enumerate(methods) if method == name]
        chosen, truth = [texts[i] for i in rows], [solution[i] for i in rows]
        if name in _BATCHED:
            score, settings = _BATCHED[name]
            scores = score(chosen, note, solution=truth, compat=compat, **settings)
        else:
            scores = _row_scores(name, chosen, truth, note, judge, compat)
        for i, value in zip(rows, scores, strict=True):
            values[i] = value
    return values


def _row_scores(name, texts, solution, note, judge, compat):
    score = _METHODS.get(name, default_accuracy)
    settings = {"compat": compat}
    if name == "llm":
        score, settings = llm, {"compat": compat, "judge": judge}
    row_wise = verified if score in (math_reward, default_accuracy) else guarded
    return row_wise(score, texts, note, {"solution": solution}, settings, 0.0)
