# SPDX-License-Identifier: Apache-2.0
"""The checkpoints a command is given, and their models."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from trl import ModelConfig

from fastgrpo.checkpoints import fault_of
from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.errors import InputError

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER)


def checkpoints_of(models: Sequence[str]) -> dict[str, str]:
    """Name -> place of every checkpoint, in order.

    A model is a checkpoint, a hub name, or a folder; one without a model of its own is a folder of
    them. Raises `InputError` for one that holds neither.
    """
    found = []
    for model in models:
        path = Path(model)
        if not path.exists():
            if model.startswith((".", "/", "~")) or model.count("/") > 1:
                raise InputError(f"MODEL: {model} does not exist")
            found.append((model.replace("/", "--"), model))
        elif any((path / name).is_file() for name in MODEL_FILES):
            found.append((path.resolve().name, model))
        else:
            found += _inside(path)
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        found = [(place.strip("/.").replace("/", "--"), place) for _, place in found]
    return dict(found)


def _inside(folder: Path) -> list[tuple[str, str]]:
    """The complete checkpoints of a folder, the earliest first; others are named."""
    places = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and any((path / name).is_file() for name in MODEL_FILES)
    ]
    complete = []
    for path in sorted(places, key=_by_step):
        fault = fault_of(path) if path.name.startswith("checkpoint-") else None
        if fault is None:
            complete.append((path.name, str(path)))
        else:
            logger.warning("%s is incomplete and skipped: %s", path, fault)
    if not complete:
        raise InputError(f"MODEL: {folder} holds no model and no complete checkpoint")
    return complete


def _by_step(path: Path) -> list[tuple[int, str]]:
    """checkpoint-20 before checkpoint-100."""
    return [(int(part or 0), text) for text, part in re.findall(r"([^0-9]*)([0-9]*)", path.name)]


def _base_of(model_config: ModelConfig) -> str:
    """Where the weights below an adapter are, the model's own place without one."""
    place = model_config.model_name_or_path
    try:
        return json.loads((Path(place) / ADAPTER).read_text())["base_model_name_or_path"]
    except FileNotFoundError:
        return place
    except (ValueError, KeyError) as error:
        raise InputError(f"MODEL: {Path(place) / ADAPTER} names no base model: {error}") from None


def load_hf_config(config: FastGRPOConfig, model_config: ModelConfig):
    """The model's configuration; raises `InputError` where there is none."""
    name = _base_of(model_config)
    try:
        return transformers.AutoConfig.from_pretrained(
            name,
            revision=model_config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model_name_or_path: no config in {name!r}: {reason}") from error


def dtype_of(config: FastGRPOConfig, model_config: ModelConfig) -> str:
    """That of the weights of a model that is not trained: what the run computes in."""
    return model_config.dtype or ("bfloat16" if config.bf16 else "float32")


def load_model(config: FastGRPOConfig, model_config: ModelConfig, hf_config):
    """The model in eval mode on the device at hand, an adapter laid over its base."""
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    place, base = model_config.model_name_or_path, _base_of(model_config)
    names = getattr(hf_config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise InputError(f"model_name_or_path: unknown architecture {names[:1] or 'none'}")
    try:
        model = cls.from_pretrained(
            base,
            revision=model_config.model_revision,
            dtype=dtype_of(config, model_config),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model_name_or_path: no weights in {base!r}: {reason}") from error
    if base != place:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, place)
    return model.to(device).eval()
