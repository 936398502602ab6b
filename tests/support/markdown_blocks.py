# SPDX-License-Identifier: Apache-2.0
"""The fenced blocks of a Markdown page that are marked as runnable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MARKED = re.compile(r"^<!-- runnable(?:: file=(\S+))? -->\n```(\w+)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """`text` of a language, to be run, or to be written to `file`."""

    language: str
    text: str
    file: str | None
    line: int


def runnable(page: str) -> Iterator[Block]:
    """The marked blocks, in order."""
    for match in MARKED.finditer(page):
        line = page.count("\n", 0, match.start()) + 1
        yield Block(match[2], match[3], match[1], line)
