# SPDX-License-Identifier: Apache-2.0
"""One greedy answer a row: in this process, in packed rows where they serve, or from a server."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from fastgrpo.errors import InputError
from fastgrpo.judges import HTTPJudge
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.frames import frame_columns, model_frame
from fastgrpo.packing import Group
from fastgrpo.rewards.read.chat import content_text
from fastgrpo.rollout import generate


@dataclass(frozen=True)
class Answer:
    """`text` without special tokens; `tokens` and whether it `ended` by itself, None where the
    server does not say; `told`: the columns of `geometry.frames` for its row.
    """

    text: str
    tokens: int | None
    ended: bool | None
    told: dict[str, Any] = field(default_factory=dict)


Answerer = Callable[[Sequence[dict]], list[Answer | None]]


@dataclass(frozen=True)
class Writing:
    """How answers are written: greedily, at most `max_new_tokens`, with a repetition penalty."""

    max_new_tokens: int
    repetition_penalty: float = 1.0
    template: dict[str, Any] = field(default_factory=dict)  # of the chat template

    def prompt(self, processor, row: dict) -> str:
        messages = row["prompt"]
        if isinstance(messages, str):
            return messages
        if not hasattr(processor, "image_processor"):  # a text model's template joins texts
            messages = [m | {"content": content_text(m["content"])} for m in messages]
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.template
        )


def packed(model, processor, writing: Writing, *, backend: str | None = None) -> Answerer:
    """Answers by `generate`: images and prompts of a batch in packed rows."""
    adapter = Adapter(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    frame = model_frame(adapter.config)
    ends = _end_ids(adapter.core, tokenizer)

    def answer(rows: Sequence[dict]) -> list[Answer | None]:
        images = [row.get("images") or [] for row in rows]
        fields = _encoded(processor, [writing.prompt(processor, row) for row in rows], images)
        masks = fields.pop("attention_mask").bool()
        prompts = [ids[own] for ids, own in zip(fields.pop("input_ids"), masks, strict=True)]
        vision = adapter.family.split_rows(fields, [len(own) for own in images], len(rows))
        device = adapter.device
        groups = [
            Group(ids, [], {key: value.to(device) for key, value in own.items()}, sample_id=i)
            for i, (ids, own) in enumerate(zip(prompts, vision, strict=True))
        ]
        filled = generate(
            model,
            groups,
            1,
            max_new_tokens=writing.max_new_tokens,
            temperature=0.0,
            repetition_penalty=writing.repetition_penalty,
            eos_token_id=ends,
            backend=backend,
        )
        told = frame_columns(frame, processor, images, fields)
        return _answers(tokenizer, ends, [group.completions[0].tolist() for group in filled], told)

    return answer


def padded(model, processor, writing: Writing) -> Answerer:
    """Answers by transformers' own generation, for a model that packed rows do not serve."""
    tokenizer = getattr(processor, "tokenizer", processor)
    frame = model_frame(model.config)
    ends = _end_ids(model, tokenizer)
    settings = GenerationConfig(  # every field: a checkpoint's own would act in place of one unset
        do_sample=False,
        max_new_tokens=writing.max_new_tokens,
        repetition_penalty=writing.repetition_penalty,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )

    @torch.no_grad()
    def answer(rows: Sequence[dict]) -> list[Answer | None]:
        images = [row.get("images") or [] for row in rows]
        fields = _encoded(processor, [writing.prompt(processor, row) for row in rows], images)
        given = {key: value.to(model.device) for key, value in fields.items()}
        ids = model.generate(**given, generation_config=settings)[:, fields["input_ids"].shape[1] :]
        told = frame_columns(frame, processor, images, fields)
        return _answers(tokenizer, ends, [_to_end(row, ends) for row in ids.tolist()], told)

    return answer


def _to_end(ids: list[int], ends: list[int]) -> list[int]:
    """A row without the padding behind its end token."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]


def _answers(tokenizer, ends: list[int], written: list[list[int]], told) -> list[Answer | None]:
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [
        Answer(text, len(ids), bool(ids) and ids[-1] in ends, own)
        for text, ids, own in zip(texts, written, told, strict=True)
    ]


def _encoded(processor, texts: list[str], images: list[list]) -> dict[str, torch.Tensor]:
    """The model's inputs for these prompts, padded to one length."""
    given = {"images": images} if any(images) else {}
    try:
        return dict(processor(text=texts, padding=True, return_tensors="pt", **given))
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"processor: these prompts cannot be encoded: {reason:.300}") from error


def _end_ids(core, tokenizer) -> list[int]:
    stated = getattr(getattr(core, "generation_config", None), "eos_token_id", None)
    stated = [stated] if isinstance(stated, int) else list(stated or ())
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*stated, *own]))


class Server:
    """Answers of a model behind an OpenAI-compatible address, such as `vllm serve` opens.

    `name`: what the server calls the model. Every sampling field is sent, so that neither the
    server's nor the checkpoint's defaults act. A row whose request fails for good is None.
    """

    def __init__(self, url: str, name: str, processor, config, writing: Writing, concurrency: int):
        self._processor, self._frame = processor, model_frame(config)
        sampling = {
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "max_tokens": writing.max_new_tokens,
            "repetition_penalty": writing.repetition_penalty,
        }
        if writing.template:
            sampling["chat_template_kwargs"] = writing.template
        self._judge = HTTPJudge(
            url,
            name,
            lambda prompt, completion, row: row["chat"],
            sampling=sampling | self._pixels(),
            concurrency=concurrency,
            timeout=600.0,
        )

    def _pixels(self) -> dict[str, Any]:
        """The limits of image sizes, which the server's own processor must keep too."""
        size = dict(getattr(getattr(self._processor, "image_processor", None), "size", None) or {})
        if not {"shortest_edge", "longest_edge"} <= size.keys():
            return {}
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        return {"mm_processor_kwargs": limits}

    def __call__(self, rows: Sequence[dict]) -> list[Answer | None]:
        images = [row.get("images") or [] for row in rows]
        flat = [image for own in images for image in own]
        made = self._processor.image_processor(images=flat, return_tensors="pt") if flat else {}
        told = frame_columns(self._frame, self._processor, images, made)
        chats = [_chat(row["prompt"], own) for row, own in zip(rows, images, strict=True)]
        texts = self._judge.replies([""] * len(rows), [""] * len(rows), chat=chats)
        return [
            None if text is None else Answer(text, None, None, own)
            for text, own in zip(texts, told, strict=True)
        ]

    @property
    def failures(self) -> dict[str, int]:
        """Requests that failed for good, by reason."""
        return dict(self._judge.failures)

    def close(self) -> None:
        self._judge.close()


def _chat(prompt: Any, images: Sequence) -> list[dict]:
    """Chat messages with every image as a PNG in the place where its part stands."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": [*({"type": "image"} for _ in images),
                                               {"type": "text", "text": prompt}]}]  # fmt: skip
    left = iter(images)
    messages = []
    for message in prompt:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append({"role": message["role"], "content": [_part(p, left) for p in parts]})
    return messages


def _part(part: dict, images) -> dict:
    if part["type"] != "image":
        return {"type": "text", "text": part["text"]}
    buffer = io.BytesIO()
    next(images).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
