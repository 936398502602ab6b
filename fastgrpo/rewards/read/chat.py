# SPDX-License-Identifier: Apache-2.0
"""The text of prompts and completions, whatever form a trainer gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]


def content_text(content: str | Sequence[Message] | None) -> str:
    """The text of one turn's content: a string, or its text parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part.get("type") == "text")


def completion_text(completion: str | Message | Sequence[Message]) -> str:
    """The text of a plain or conversational completion (its last assistant message)."""
    if isinstance(completion, str):
        text = completion
    elif isinstance(completion, dict):
        text = _message_text(completion)
    else:
        said = [m for m in completion if m.get("role") == "assistant"] or [completion[-1]]
        text = _message_text(said[-1])
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates; every parser works on UTF-8
        text = text.encode("utf-8", "replace").decode()
    return text


def _message_text(message: Message) -> str:
    """What the model wrote: TRL takes thoughts out of the content where the tokenizer parses."""
    content, thought = content_text(message["content"]), message.get("reasoning_content")
    return content if thought is None else f"<think>{thought}</think>\n{content}"


def chat_text(chat: str | Sequence[Message]) -> str:
    """The text of a plain string or of a whole chat, one line break between turns."""
    if isinstance(chat, str):
        return chat
    said = (turn["content"] for turn in chat)
    return "\n".join(content_text(content) for content in said if content is not None)


def text_only(chat: Sequence[Message]) -> list[Message]:
    """The chat with each turn's content as text, image parts left out."""
    return [{"role": turn["role"], "content": content_text(turn["content"])} for turn in chat]


def question_text(prompt: str | Sequence[Message] | None) -> str:
    """The text of a plain prompt, or of the last user turn of a conversational one."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    asked = [turn for turn in prompt if turn.get("role") == "user"]
    return content_text(asked[-1]["content"]) if asked else ""
