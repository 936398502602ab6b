# SPDX-License-Identifier: Apache-2.0
"""Words of model text: cleaning, repetition, word errors, overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from fastgrpo.rewards.read.tags import last_answer


def clean_text(text: str) -> str:
    """VLM-R1's canonical answer: last `<answer>`, one line, no final full stops, lower case."""
    text = last_answer(text)
    for newline in "\n\r":
        text = _join_lines(text, newline)
    return text.strip().rstrip(".").lower()


def _join_lines(text: str, newline: str) -> str:
    """Each `newline` becomes a space, or nothing where a blank precedes it."""
    lines = text.split(newline)
    joined = [lines[0]]
    for i, line in enumerate(lines[1:]):
        before = lines[i][-1:] if lines[i] or i == 0 else newline
        joined += ("", line) if before.isspace() else (" ", line)
    return "".join(joined)


def ngram_repetition(words: Sequence[Any], size: int) -> float:
    """1 - (distinct n-grams) / (n-grams); 0 without any n-gram."""
    total = len(words) - size + 1
    if total <= 0:
        return 0.0
    if isinstance(words, str):
        return 1 - len({words[i : i + size] for i in range(total)}) / total
    # One character per distinct word makes every n-gram a short string, cheap to cut and hash.
    codes: dict[Any, str] = {}
    text = "".join([codes.setdefault(word, _character(len(codes))) for word in words])
    return 1 - len({text[i : i + size] for i in range(total)}) / total


def _character(number: int) -> str:
    return chr(number if number < 0xD800 else number + 0x800)  # no surrogates


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Word edits / words of the reference, as jiwer counts; only edits for an empty reference."""
    from rapidfuzz.distance import Levenshtein

    words = [_jiwer_words(side) for side in (reference, hypothesis)]
    return Levenshtein.distance(*words) / max(len(words[0]), 1)


def _jiwer_words(text: str) -> list[str]:
    """Blanks separate words; two or more blanks of any kind count as one blank."""
    runs = ("".join(run) for _, run in groupby(text, str.isspace))
    text = "".join(" " if len(run) > 1 and run.isspace() else run for run in runs)
    return [word for word in text.strip().split(" ") if word]


def rouge_mean(reference: str, hypothesis: str) -> float:
    """Mean of the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L over lower-case ASCII words."""
    from rapidfuzz.distance import LCSseq

    words = [_ascii_words(side) for side in (reference, hypothesis)]
    lengths = [len(side) for side in words]
    common = LCSseq.similarity(*words) if all(lengths) else 0
    overlap = [_ngram_f(*words, size=n) for n in (1, 2)]
    return (sum(overlap) + _f_measure(common, *lengths)) / 3


def _ascii_words(text: str) -> list[str]:
    return "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()


def _ngram_f(a: list[str], b: list[str], size: int) -> float:
    grams = [Counter(zip(*(side[i:] for i in range(size)), strict=False)) for side in (a, b)]
    return _f_measure((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def _f_measure(common: int, a: int, b: int) -> float:
    return 2 * common / (a + b) if common else 0.0
