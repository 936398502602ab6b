# SPDX-License-Identifier: Apache-2.0
"""Turns of a conversation as a prompt, the images in it, the question and the answer.

Both written forms are read: `{"from": "human", "value": ...}` (ShareGPT, LLaVA, VLM-R1) and
`{"role": "user", "content": ...}`, the content a text or a list of parts. A text holds one
`<image>` where an image stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

TAG, OTHER_TAGS = "<image>", ("<video>", "<audio>")
QUESTION = "{Question}"
# The Qwen-VL processors put one of these per image patch; written in a text they count as images.
IMAGE_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "model", "chatgpt", "bot", "bard", "bing", "claude"), "assistant"
    ),
}  # in any case of letters
# What else of a turn would have to reach the model, and does not.
_UNREAD = ("image", "images", "video", "videos", "audio", "audios", "tool_calls", "function_call")


class RowFault(Exception):
    """One row that cannot be used; `reason` is a short code, the message the details."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """`prompt`: messages whose content is a list of text and image parts; `images`: the source of
    every image part in order; `problem`: the last question without its tags; `answer`: what the
    last turn holds, as written.
    """

    prompt: list[dict]
    images: list
    problem: str
    answer: Any


def read_conversation(
    turns: object,
    images: Sequence,
    *,
    template: str = QUESTION,
    system: str | None = None,
    image_tokens: Iterable[str] = IMAGE_TOKENS,
    resolve: Callable[[Any], Any] = lambda source: source,
) -> Conversation:
    """Reads `[system,] question, answer, ..., question, answer`: the last answer is the solution,
    all before it is the prompt, the last question in `template`.

    Turns without `from` and `role` alternate, the question first. `system` is a system text kept
    outside the turns; `resolve` is applied to the image a part carries itself. Raises `RowFault`
    unless roles alternate so, the tags of the prompt are as many as `images` (parts with an image
    of their own not counted), and no text holds one of `image_tokens`.
    """
    roles, contents = _roles_and_contents(turns)
    messages = [{"role": "system", "content": _parts(system)}] if system else []
    if roles[0] == "system":
        if messages:
            raise RowFault("roles", "a system turn and a system column: which one is meant?")
        messages = [{"role": "system", "content": _parts(contents[0])}]
        roles, contents = roles[1:], contents[1:]
    _check_order(roles)
    for role, content in zip(roles[:-2], contents[:-2], strict=True):
        messages.append({"role": role, "content": _parts(content)})
    question = _parts(contents[-2], "question")
    problem = "".join(part["text"] for part in question if part["type"] == "text")
    if not problem.strip():
        raise RowFault("question", "the question holds no text")
    messages.append({"role": "user", "content": _in_template(question, template)})
    answer = contents[-1]
    if isinstance(answer, str):
        _refuse_tags(answer, "answer")
    prompt, sources = read_prompt(messages, images, image_tokens=image_tokens, resolve=resolve)
    return Conversation(prompt, sources, problem, answer)


def read_prompt(
    messages: object,
    images: Sequence,
    *,
    image_tokens: Iterable[str] = IMAGE_TOKENS,
    resolve: Callable[[Any], Any] = lambda source: source,
) -> tuple[list[dict], list]:
    """(messages of parts, the source of every image part in order); raises `RowFault`."""
    if not isinstance(messages, list) or not messages:
        raise RowFault("prompt", f"expected a list of messages, got {messages!r:.200}")
    prompt, sources, left = [], [], iter(images)
    for message in messages:
        role, content = _role_and_content(message)
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise RowFault("roles", f"{role!r:.100} is none of {', '.join(ROLES)}")
        parts = _parts(content)
        for part in parts:
            if part["type"] == "image":
                own = part.pop("image", None)
                sources.append(None if own is None else resolve(own))
            else:
                _refuse_tokens(part["text"], image_tokens)
        prompt.append({"role": ROLES[role.lower()], "content": parts})
    open_places = sum(source is None for source in sources)
    if open_places != len(images):
        raise RowFault(
            "image_tags", f"{open_places} {TAG} tag(s) for {len(images)} image(s): they must agree"
        )
    return prompt, [next(left) if source is None else source for source in sources]


def as_user_turn(prompt: object, num_images: int) -> object:
    """`prompt`, a text as one user message; images no tag or part has a place for come first, as
    in TRL.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not num_images or not isinstance(messages, list):
        return messages
    parts = [_parts(_role_and_content(message)[1]) for message in messages]
    if any(part["type"] == "image" for content in parts for part in content):
        return messages
    roles = [ROLES.get(str(_role_and_content(message)[0]).lower()) for message in messages]
    first = roles.index("user") if "user" in roles else 0
    placed = [{"type": "image"}] * num_images + parts[first]
    return [
        *messages[:first],
        messages[first] | {"content": placed},
        *messages[first + 1 :],
    ]


def text_parts(text: str) -> list[dict]:
    """`text` cut at its tags: text and image parts, the empty texts left out."""
    _refuse_other_tags(text)
    parts: list[dict] = []
    for index, piece in enumerate(text.split(TAG)):
        parts += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return [dict(part) for part in parts]


def _roles_and_contents(turns: object) -> tuple[list[str], list]:
    if not isinstance(turns, list) or len(turns) < 2:
        raise RowFault(
            "conversations", f"expected a list of a question and an answer, got {turns!r:.200}"
        )
    named, contents = zip(*map(_role_and_content, turns), strict=True)
    if all(role is None for role in named):
        return [("user", "assistant")[i % 2] for i in range(len(turns))], list(contents)
    for role in named:
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise RowFault("roles", f"{role!r:.100} is none of {', '.join(ROLES)}")
    return [ROLES[role.lower()] for role in named], list(contents)


def _role_and_content(turn: object) -> tuple[Any, Any]:
    if not isinstance(turn, dict):
        return None, None
    unread = [name for name in _UNREAD if turn.get(name)]
    if unread:
        raise RowFault("conversations", f"a turn with {unread[0]!r} cannot be read whole")
    role = turn.get("from") if turn.get("from") is not None else turn.get("role")
    return role, turn["value"] if "value" in turn else turn.get("content")


def _check_order(roles: list[str]) -> None:
    """Question and answer in turn, from a question to an answer."""
    order = " ".join(roles) or "nothing"
    if not roles or roles[0] != "user":
        raise RowFault("roles", f"the first turn must be a question, the roles are: {order}")
    if "system" in roles:
        raise RowFault("roles", f"a system turn must be the first and only one, roles: {order}")
    if any(a == b for a, b in pairwise(roles)):
        raise RowFault("roles", f"questions and answers must alternate, the roles are: {order}")
    if roles[-1] != "assistant":
        raise RowFault("answer", f"the last question has no answer, the roles are: {order}")


def _parts(content: object, name: str = "turn") -> list[dict]:
    if isinstance(content, str):
        return text_parts(content)
    if not isinstance(content, list) or not content:
        raise RowFault(name, f"a {name} must be a text or a list of parts, got {content!r:.200}")
    return list(_merged(part for piece in content for part in _part(piece, name)))


def _part(piece: object, name: str) -> list[dict]:
    kind = piece.get("type") if isinstance(piece, dict) else None
    if kind == "text" and isinstance(piece.get("text"), str):
        return text_parts(piece["text"])
    if kind == "image":
        source = piece.get("image", piece.get("path", piece.get("url")))
        return [{"type": "image"} | ({} if source is None else {"image": source})]
    if kind == "image_url":
        url = piece.get("image_url")
        return [{"type": "image", "image": url.get("url") if isinstance(url, dict) else url}]
    raise RowFault(name, f"a part must be a text or an image, got {piece!r:.200}")


def _merged(parts: Iterable[dict]) -> Iterator[dict]:
    """Neighbouring texts as one."""
    last: dict | None = None
    for part in parts:
        if last is not None and last["type"] == part["type"] == "text":
            last = {"type": "text", "text": last["text"] + part["text"]}
            continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last


def _in_template(question: list[dict], template: str) -> list[dict]:
    """The question in `template`; images that lead it lead the whole turn."""
    lead = next((i for i, part in enumerate(question) if part["type"] == "text"), len(question))
    before, after = template.split(QUESTION)
    texts = ([{"type": "text", "text": text}] if text else [] for text in (before, after))
    prefix, suffix = texts
    return [*question[:lead], *_merged([*prefix, *question[lead:], *suffix])]


def _refuse_tokens(text: str, tokens: Iterable[str]) -> None:
    for token in tokens:
        if token in text:
            raise RowFault(
                "image_token", f"the text holds {token}, which the model takes for part of an image"
            )


def _refuse_other_tags(text: str) -> None:
    for tag in OTHER_TAGS:
        if tag in text:
            raise RowFault("image_tags", f"the text holds {tag}: only images can be trained on")


def _refuse_tags(text: str, where: str) -> None:
    for tag in (TAG, *OTHER_TAGS):
        if tag in text:
            raise RowFault("image_tags", f"the {where} holds {tag}: no file stands for it")
