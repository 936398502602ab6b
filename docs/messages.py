# SPDX-License-Identifier: Apache-2.0
"""`python docs/messages.py > docs/troubleshooting.md`: every refusal in the source, what to do.

The messages are read from the calls that raise them, the explanations from remedies.toml.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERRORS = {
    *("InputError", "SelfCheckError", "MissingPackage", "FloatingPointError"),
    *("BadColumn", "ImageFault"),
}


def messages() -> Iterator[tuple[str, str]]:
    """(file below fastgrpo/, text) of each message; a text made elsewhere is its expression."""
    package = ROOT / "fastgrpo"
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args and _name(node.func) in ERRORS:
                yield path.relative_to(package).as_posix(), _text(node.args[0])


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        whole = "".join(v.value if isinstance(v, ast.Constant) else "{...}" for v in node.values)
        return " ".join(whole.split())
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "{...}"


def remedies() -> dict:
    """remedies.toml: its `intro`, and each `topic` in order."""
    return tomllib.loads((ROOT / "docs" / "remedies.toml").read_text("utf-8"))


def topic_of(file: str, text: str, known: list[dict]) -> dict | None:
    """The first topic that fits."""
    for topic in known:
        if any(re.search(pattern, text) for pattern in topic.get("messages", ())):
            return topic
        if any(fnmatch(file, pattern) for pattern in topic.get("files", ())):
            return topic
    return None


def sorted_out() -> tuple[list[tuple[dict, list[str]]], list[tuple[str, str]]]:
    """(each topic with its texts, what belongs to none). A text without a word of its own is left
    out: what it says is written elsewhere."""
    known = remedies()["topic"]
    texts: list[set[str]] = [set() for _ in known]
    lost = []
    for file, text in messages():
        topic = topic_of(file, text, known)
        if topic is None:
            lost.append((file, text))
        elif re.search(r"\w", text.replace("{...}", "")):
            texts[known.index(topic)].add(text)
    return [(topic, sorted(own)) for topic, own in zip(known, texts, strict=True)], lost


def page() -> str:
    """The Markdown page."""
    parts = [remedies()["intro"]]
    for topic, texts in sorted_out()[0]:
        listed = "\n".join(texts)
        parts.append(
            f"## {topic['title']}\n\n{topic['remedy'].strip()}\n\n```text\n{listed}\n```\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
