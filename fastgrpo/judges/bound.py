# SPDX-License-Identifier: Apache-2.0
"""Judges that need a trainer's model and processor: built when the trainer is bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.errors import InputError
from fastgrpo.models.family import TEXT_OUTPUTS
from fastgrpo.packing import Group


class Bound:
    """A reward function that `build(trainer)` makes once a trainer is there."""

    def __init__(self, build: Callable[[Any], Callable], name: str, columns: Sequence[str] = ()):
        self.build, self.name = build, name
        self.__name__ = name.replace("/", "_")
        self.columns = tuple(columns)
        self.inner: Callable | None = None

    def bind(self, trainer: Any) -> None:
        """Make the reward from the trainer's model and processor."""
        self.inner = self.build(trainer)

    def __call__(self, prompts, completions, **columns):
        """The rewards of a batch."""
        if self.inner is None:
            raise InputError(f"{self.name}: no trainer bound")
        return self.inner(prompts=prompts, completions=completions, **columns)

    def state_dict(self) -> dict[str, Any]:
        """What the reward keeps between batches; {} if nothing."""
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the trainer must be bound."""
        self.inner.load_state_dict(state)


class Chats:
    """Chats and texts as a trainer's processor encodes them."""

    def __init__(self, trainer: Any):
        self.processor = trainer.processing_class
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)

    def group(self, chat: list[dict], images: Sequence = (), *, reply: str | None = None) -> Group:
        """The chat so far as a prompt, with ``reply`` the assistant's words appended."""
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        text += reply or ""
        if images:
            data = self.processor(text=[text], images=list(images), return_tensors="pt")
            vision = {key: value for key, value in data.items() if key not in TEXT_OUTPUTS}
            return Group(data["input_ids"][0], [], vision)
        return Group(self.tokenizer(text, return_tensors="pt")["input_ids"][0], [])

    def row_group(self, prompt: list[dict], row: Mapping[str, Any], reply: str) -> Group:
        """A row's prompt with its images, and ``reply`` appended."""
        own = row.get("images") or [row.get("image")]
        images = [image for image in own if image is not None]
        return self.group(with_placeholders(prompt, images), images, reply=reply)

    def ids(self, text: str) -> Tensor:
        """The ids of a text, without special tokens, int64."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def with_placeholders(prompt: list[dict], images: Sequence) -> list[dict]:
    """The chat with one image part per image in its first user turn, as the template needs it."""
    first = next(i for i, turn in enumerate(prompt) if turn["role"] == "user")
    content = prompt[first]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    missing = len(images) - sum(part.get("type") == "image" for part in parts)
    turn = {"role": "user", "content": [{"type": "image"}] * max(missing, 0) + parts}
    return [*prompt[:first], turn, *prompt[first + 1 :]]


def load_frozen(path: str | None, trainer: Any) -> nn.Module:
    """A frozen model from ``path``, or the trainer's policy when there is none."""
    if path is None:
        return trainer.accelerator.unwrap_model(trainer.model)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.to(trainer.accelerator.device).eval().requires_grad_(False)
