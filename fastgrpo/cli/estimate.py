# SPDX-License-Identifier: Apache-2.0
"""What a run will hold in memory, by formula, from the model's config alone.

Letters: T tokens of a micro-batch (its prompts once each and its completions), L layers, D hidden
size, F width of the feed-forward layer, b bytes of a number.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import re2
import torch
from torch import nn
from trl import ModelConfig

from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.errors import InputError

ADAM_BYTES = 8  # two float32 moments
LOGIT_BYTES = 512 << 20  # the head's workspace is kept below this, see ops/linear


@dataclass(frozen=True)
class Memory:
    """Bytes by what holds them, and of the device."""

    parameters: int
    trainable: int
    parts: dict[str, int]
    device: str
    available: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(
    config: FastGRPOConfig, model_config: ModelConfig, hf_config, prompt_tokens: int
) -> Memory:
    """Weights, gradients, Adam's moments, the reference, activations and the cache of a rollout.

    Activations: T·D·b·(L + 8) + T·F·b·4 with checkpointing (one saved input a layer, one layer
    recomputed), T·L·b·(12·D + 4·F) without. Cache: 2·b·(key and value width)·L per token.
    """
    model = empty_model(hf_config)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = _trainable(model, config, model_config)
    size = {"bfloat16": 2, "float16": 2}.get(model_config.dtype or "float32", 4)
    compute = 2 if config.bf16 or config.fp16 else size
    text = hf_config.get_text_config()
    rows = config.per_device_train_batch_size
    prompts = -(-rows // config.num_generations)
    tokens = prompts * prompt_tokens + rows * config.max_completion_length
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers, width, inner = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    checkpointed = config.gradient_checkpointing
    per_token = (
        width * (layers + 8) + 4 * inner if checkpointed else layers * (12 * width + 4 * inner)
    )
    has_reference = config.beta != 0 and not model_config.use_peft
    rollout = (
        tokens
        if config.packed_rollout is not False
        else rows * (prompt_tokens + config.max_completion_length)
    )
    parts = {
        "weights": parameters * size,
        "gradients": trainable * size,
        "optimizer": trainable * ADAM_BYTES,
        "reference": parameters * size if has_reference else 0,
        "activations": tokens * per_token * compute,
        "logits": min(LOGIT_BYTES, tokens * text.vocab_size * 4),
        "rollout cache": rollout * 2 * heads * head * layers * compute,
    }
    return Memory(parameters, trainable, parts, *_device(config))


def empty_model(hf_config) -> nn.Module:
    """The model on the meta device: shapes, and not one byte of weights."""
    import transformers

    names = getattr(hf_config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise InputError(f"model_name_or_path: unknown architecture {names[:1] or 'none'}")
    with torch.device("meta"):
        return cls(hf_config)


def _trainable(model: nn.Module, config: FastGRPOConfig, model_config: ModelConfig) -> int:
    def counts(name: str) -> bool:
        return not (config.freeze_vision and ("visual." in name or "vision" in name))

    if not model_config.use_peft:
        return sum(p.numel() for name, p in model.named_parameters() if counts(name))
    head = model.get_output_embeddings()
    return sum(
        model_config.lora_r * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and counts(name)
        and _is_target(name, model_config.lora_target_modules or "all-linear")
    )


def _is_target(name: str, targets: str | list[str]) -> bool:
    """Whether PEFT puts an adapter there: a text is a pattern of whole names, a list their ends."""
    if isinstance(targets, str):
        return targets == "all-linear" or re2.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _device(config: FastGRPOConfig) -> tuple[str, int]:
    if torch.cuda.is_available() and not config.use_cpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.name, properties.total_memory
    return "this machine's memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
