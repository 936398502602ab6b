"""Reading model text in linear time: tags, fences, JSON, numbers.

Patterns run on RE2, which has no backtracking; everything that can be a `str.find` is one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson
import re2

from fastgrpo.rewards.registry import Unscorable

# Enough for 4,000 boxes; orjson needs about 3 ms and 20 MB for the worst text of this length.
MAX_JSON = 1 << 18

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
    while (opened := text.find(start, position)) >= 0:
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
