# SPDX-License-Identifier: Apache-2.0
"""ViCrit's reward (paper; evaluation code si0wang/ViCrit@727f1ee): find the changed phrase."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.faults import MAX_ANSWER, BadColumn, short
from fastgrpo.rewards.read.tags import pattern

SOURCE = "si0wang/ViCrit@727f1ee"


def changed_tokens(before: str, after: str) -> list[str]:
    """The words of `after` that are neither in the common prefix nor in the common suffix."""
    before, after = before.split(), after.split()
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    return after[start : len(after) - end]


def boxed_or_last_line(text: str) -> str | None:
    r"""Content of the first `\boxed{`, without its last character if it is never closed."""
    if "boxed{" not in text:
        return text.rsplit("\n", 1)[-1]
    start = text.find("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth, end = 1, start
    while end < len(text) and depth:
        depth += (text[end] == "{") - (text[end] == "}")
        end += 1
    return text[start : end - 1]


def _truth(*, original_noun_phrase, changed_noun_phrase, **columns) -> str:
    return f"<think>t</think>\\boxed{{{changed_noun_phrase}}}"


@reward(
    "vicrit/answer",
    columns=("original_noun_phrase", "changed_noun_phrase"),
    source=SOURCE,
    truth=_truth,
)
def answer_reward(text: str, *, original_noun_phrase: str, changed_noun_phrase: str) -> float:
    r"""1 when the `\boxed{}` answer (or the last line) names what was changed in the caption.

    Source: si0wang/ViCrit@727f1ee, `relaxed_correctness`. "upstream": the first changed word is a
    substring of the answer, so "dogma" names "dog"; equal phrases raise IndexError. "fixed": all
    changed words occur in the answer, one after another and as whole words; equal phrases give
    None.
    """
    before, after = original_noun_phrase.lower(), changed_noun_phrase.lower()
    wanted = [_bare(word) for word in changed_tokens(before, after)]
    if not wanted:
        raise BadColumn("the two phrases do not differ")
    said = _fixed_answer(text)
    words = [_bare(word) for word in said.lower().split()]
    size = len(wanted)
    return float(any(words[i : i + size] == wanted for i in range(len(words) - size + 1)))


def _fixed_answer(text: str) -> str:
    start = text.rfind("\\boxed{")
    said = boxed_or_last_line(text[start : start + MAX_ANSWER]) if start >= 0 else None
    said = text.strip().rsplit("\n", 1)[-1] if said is None else said
    return short(said)


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()[]")


@reward("vicrit/format", source=SOURCE)
def format_reward(text: str) -> float:
    r"""1 for `<think>...</think>` followed by a `\boxed{...}`, else 0.

    The training code is not released; the tags are our reading of the paper. Both modes the same.
    """
    return float(pattern(r"\s*<think>.*?</think>.*\\boxed\{.*\}").match(text) is not None)


@reward(
    "vicrit/total",
    columns=("original_noun_phrase", "changed_noun_phrase"),
    source="ViCrit paper, 0.9 * answer + 0.1 * format",
    truth=_truth,
)
def total(text: str, *, original_noun_phrase: str, changed_noun_phrase: str) -> float:
    """0.9 answer + 0.1 format; the advantage of the paper is r - mean without std."""
    phrases = {"original_noun_phrase": original_noun_phrase,
               "changed_noun_phrase": changed_noun_phrase}  # fmt: skip
    return 0.9 * answer_reward(text, **phrases) + 0.1 * format_reward(text)
