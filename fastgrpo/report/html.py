# SPDX-License-Identifier: Apache-2.0
"""The parts of a page that needs no other file; model text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

MAX_TEXT = 2000


def page(title: str, subtitle: str, *parts: str) -> str:
    """The whole page; `parts` are HTML, title and subtitle text."""
    template = Template((Path(__file__).parent / "page.html").read_text())
    return template.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        body="\n".join(part for part in parts if part),
    )


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """(value, what it is) side by side."""
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span class="soft">{escape(label)}</span></div>'
        for value, label in figures
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def notes(head: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="notes">{escape(head)}<ul>{items}</ul></div>' if items else ""


def image(png: bytes, label: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(label)}" src="data:image/png;base64,{data}">'


def chosen(shown: Sequence[int], count: int) -> str:
    """Which of `count` images are shown, where not all are."""
    numbers = ", ".join(str(index + 1) for index in shown)
    return f'<span class="soft">images {numbers} of {count}</span>' if len(shown) < count else ""


def number(value: float | None) -> str:
    return "not scored" if value is None or value != value else f"{value:.3f}"


def text(words: str) -> str:
    """Escaped, cut where it is long."""
    return escape(words if len(words) <= MAX_TEXT else words[:MAX_TEXT] + " …")
