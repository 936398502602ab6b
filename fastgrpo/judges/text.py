"""The text of prompts and completions, whatever form a trainer gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def chat_text(message: str | Sequence[dict[str, Any]]) -> str:
    """The text of a plain string or of a chat: contents of all turns, image parts left out."""
    if isinstance(message, str):
        return message
    parts = []
    for turn in message:
        content = turn["content"]
        if isinstance(content, str):
            parts.append(content)
        else:
            parts.extend(p["text"] for p in content or () if p.get("type") == "text")
    return "\n".join(parts)
