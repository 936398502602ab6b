"""Reading model text in linear time: tags, fences, JSON, numbers.

Patterns run on RE2, which has no backtracking; everything that can be a `str.find` is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

import orjson
import re2

from fastgrpo.rewards.registry import Unscorable

# Enough for 4,000 boxes; orjson needs about 3 ms and 20 MB for the worst text of this length.
MAX_JSON = 1 << 18

# The last of more pairs of tags is not looked for; 4,096 take about 2 ms.
MAX_PAIRS = 4096

# Python's `\d` and `\s` on str; RE2's own are ASCII.
DIGIT = r"\p{Nd}"
SPACE = r"[\s\v\x1c-\x1f\x{85}\p{Z}]"


@cache
def pattern(source: str):
    """A compiled RE2 pattern in which `.` matches newlines."""
    options = re2.Options()
    options.dot_nl = True
    options.log_errors = False
    return re2.compile(source, options)


def between(text: str, start: str, end: str, *, last: bool = False) -> str | None:
    """What lies between `start` and the next `end`: first or last such pair, None without one."""
    found, position = None, 0
    for _ in range(MAX_PAIRS):
        opened = text.find(start, position)
        if opened < 0:
            break
        closed = text.find(end, opened + len(start))
        if closed < 0:
            break
        found = text[opened + len(start) : closed]
        if not last:
            break
        position = closed + len(end)
    return found


def answer(text: str, *, last: bool = False) -> str | None:
    """The content of the first (or last) `<answer>...</answer>`."""
    return between(text, "<answer>", "</answer>", last=last)


def one_line_answer(text: str) -> str:
    """The first `<answer>` that does not span lines, stripped, or the whole text without one."""
    position = 0
    while (opened := text.find("<answer>", position)) >= 0:
        opened += len("<answer>")
        closed = text.find("</answer>", opened)
        if closed < 0:
            break
        if text.find("\n", opened, closed) < 0:
            return text[opened:closed].strip()
        position = opened
    return text.strip()


def open_answer(text: str) -> str | None:
    """The first `<answer>`; where it is never closed, up to the next `<answer>` or the end."""
    content = answer(text)
    if content is None:
        opened = text.find("<answer>")
        if opened < 0:
            return None
        content = text[opened + len("<answer>") :].split("<answer>", 1)[0]
    return content.strip()


def think_answer(text: str) -> bool:
    """The whole text is `<think>...</think> <answer>...</answer>`, as R1-style code tests it."""
    whole = rf"<think>.*?</think>{SPACE}*<answer>.*?</answer>"
    return pattern(whole).fullmatch(text) is not None


def lone_letters(text: str, letters: str) -> list[str]:
    """The capital `letters` of the upper-cased text with no ASCII letter beside them, in order."""
    text = text.upper().strip()
    found: dict[str, None] = {}
    for i, char in enumerate(text):
        if char in letters and not any(
            n.isascii() and n.isalpha() for n in (text[i - 1 : i], text[i + 1 : i + 2])
        ):
            found[char] = None
    return list(found)


def fenced_json(text: str, *, last: bool = False) -> str | None:
    """The content of the first (or last) ```` ```json ... ``` ```` block."""
    return between(text, "```json", "```", last=last)


def loads(text: str) -> Any:
    """Strict JSON under a length cap; raises Unscorable with the reason."""
    if len(text) > MAX_JSON:
        raise Unscorable("json_too_long")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Unscorable("bad_json") from None


def clean_text(text: str) -> str:
    """VLM-R1's canonical answer: last `<answer>`, one line, no final full stops, lower case."""
    tagged = answer(text, last=True)
    text = text if tagged is None else tagged
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


_KEYWORDS = (
    "答案 选择 正确 是 对 ANSWER CORRECT CHOOSE SELECT RIGHT 认为 应该 觉得 THINK BELIEVE SHOULD"
).split()
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def extract_choice(text: str) -> str | None:
    """VLM-R1's choice letter: a capital of the upper-cased text with no capital before it and
    one of `.,?!:;` or the end after it; of several the one with the best surroundings.
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
