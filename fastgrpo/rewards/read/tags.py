# SPDX-License-Identifier: Apache-2.0
"""Tags in model text: answers, thoughts and fences.

Patterns run on RE2, which has no backtracking; everything that can be a `str.find` is one.
"""

from __future__ import annotations

from functools import cache

import re2

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
    opened = text.find(start)
    if opened < 0:
        return None
    closed = text.find(end, opened + len(start))
    if closed < 0:
        return None
    found, position = text[opened + len(start) : closed], closed + len(end)
    for _ in range(MAX_PAIRS - 1 if last else 0):
        opened = text.find(start, position)
        if opened < 0:
            break
        closed = text.find(end, opened + len(start))
        if closed < 0:
            break
        found, position = text[opened + len(start) : closed], closed + len(end)
    return found


def answer(text: str, *, last: bool = False) -> str | None:
    """The content of the first (or last) `<answer>...</answer>`."""
    opened = text.find("<answer>")
    closed = text.find("</answer>", opened + 8) if opened >= 0 else -1
    if closed < 0:
        return None
    if last and text.find("<answer>", closed) >= 0:
        return between(text, "<answer>", "</answer>", last=True)
    return text[opened + 8 : closed]


def answer_or_all(text: str, *, last: bool = False) -> str:
    """The content of the first (or last) `<answer>`, or the whole text without one."""
    content = answer(text, last=last)
    return text if content is None else content


def last_answer(text: str) -> str:
    """The content of the last `<answer>`, or the whole text without one."""
    content = answer(text, last=True)
    return text if content is None else content


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


def think_then_answer(text: str) -> str | None:
    """The answer of a text that is exactly one think block and one answer block, else None."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return None
    if not text.startswith("<think>") or not text.endswith("</answer>"):
        return None
    closed, opened = text.find("</think>"), text.find("<answer>")
    if not closed < opened or text[closed + len("</think>") : opened].strip():
        return None
    content = answer(text)
    return content if content.strip() else None


def fenced_json(text: str, *, last: bool = False) -> str | None:
    """The content of the first (or last) ```` ```json ... ``` ```` block."""
    return between(text, "```json", "```", last=last)
