# SPDX-License-Identifier: Apache-2.0
"""VLM-R1's command lines on today's trainer: each of its flags mapped, kept or answered.

Source of the flags: om-ai-lab/VLM-R1, `grpo_jsonl.py`, `grpo_config.py` and `run_scripts/`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.data.mixture import ALL, read_mixture
from fastgrpo.errors import InputError

REWARDS = {
    "accuracy": "vlm_r1/accuracy",
    "format": "vlm_r1/format",
    "length": "vlm_r1/cosine",
    "repetition": "vlm_r1/repetition",
}
# `--is_reward_customized_from_vlm_module` with the task rec, by what the model's path contains.
CUSTOMIZED = {
    "qwen": {"accuracy": "vlm_r1/iou", "format": "vlm_r1/format_rec"},
    "internvl": {"accuracy": "vlm_r1/iou_internvl", "format": "vlm_r1/format_rec_internvl"},
    "glm": {"accuracy": "vlm_r1/iou_glm", "format": "vlm_r1/format_rec_glm"},
}
# Its own defaults where they differ from ours.
DEFAULTS = {
    "beta": "0.04",
    "max_completion_length": "256",
    "reward_funcs": ["accuracy", "format"],
    "task_type": "default",
}
RENAMED = {
    "freeze_vision_modules": "freeze_vision",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
}
# Arguments of its transformers and TRL that today's have dropped.
GONE = (
    *("overwrite_output_dir", "save_safetensors", "logging_dir"),
    *("gradient_checkpointing_use_reentrant", "ignore_bias_buffers"),
)
# Parsed there and never used; what each does here is said when it is given.
IGNORED_THERE = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation"),
    *("use_vllm", "vllm_device", "vllm_gpu_memory_utilization", "vllm_dtype"),
    *("vllm_max_model_len", "vllm_enable_prefix_caching", "vllm_guided_decoding_regex"),
    *("reward_weights", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("log_completions", "ds3_gather_for_generation", "max_prompt_length", "arrow_cache_dir"),
)
_ONLY_THERE = (
    *("is_reward_customized_from_vlm_module", "freeze_vision_modules", "max_anyres_num"),
    "image_root",
)
FALSE, TRUE = ("false", "no", "0"), ("true", "yes", "1")


@dataclass
class Settings:
    """`values`: settings by name, texts or lists of them; `notes`: lines that say what was done."""

    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def drop(self, name: str, note: str) -> None:
        self.values.pop(name)
        self.notes.append(f"{name}: {note}")


def is_vlm_r1(values: dict[str, Any]) -> bool:
    """Whether these settings are written as VLM-R1's scripts write them."""
    return (
        any(name in values for name in _ONLY_THERE)
        or bool(set(_listed(values.get("reward_funcs"))) & set(REWARDS))
        or _has_dummy(values)
    )


def _has_dummy(values: dict[str, Any]) -> bool:
    """Its scripts must name a dataset, which nothing reads: `--dataset-name not_used`."""
    name = str(values.get("dataset_name", "/"))
    return "data_file_paths" in values and "/" not in name and not Path(name).exists()


def translate(values: dict[str, Any], known: Container[str]) -> Settings:
    """VLM-R1's settings as this command's; `known` holds the names of all that it takes.

    Raises `InputError` for a reward or a task that VLM-R1 has not either.
    """
    settings = Settings(DEFAULTS | values)
    for name, value in DEFAULTS.items():
        if name not in values:
            settings.notes.append(f"{name}: {' '.join(_listed(value))}, VLM-R1's own default")
    if _has_dummy(values):
        settings.drop("dataset_name", "VLM-R1 takes a dummy here; the rows are data_file_paths'")
    _mixture(settings)
    _rewards(settings)
    _words(settings)
    _renamed(settings)
    _ignored_there(settings, known)
    _tiles(settings)
    _dropout(settings)
    _resume(settings)
    _whole_groups(settings)
    _folders(settings)
    return settings


def _renamed(settings: Settings) -> None:
    for name, ours in RENAMED.items():
        if name in settings.values and ours in settings.values:
            settings.drop(name, f"{ours} is given too and decides")
        elif name in settings.values:
            settings.values[ours] = settings.values.pop(name)
            settings.notes.append(f"{name}: is {ours} here")
    for name in GONE:
        if name in settings.values:
            settings.drop(name, "today's transformers and TRL have nothing to set here")


def _mixture(settings: Settings) -> None:
    """`grpo_rec.py`: a YAML list of files below `image_root`, always with the rewards of rec."""
    values = settings.values
    path = Path(str(values.get("dataset_name", "")))
    if path.suffix not in (".yaml", ".yml"):
        if "image_root" in values:
            raise InputError("image_root: goes with a YAML list of files as dataset_name")
        return
    files, shares = read_mixture(path)
    settings.drop("dataset_name", f"a list of files, read as data_file_paths {':'.join(files)}")
    values["data_file_paths"] = ":".join(files)
    if "image_root" in values:
        values["image_folders"] = ":".join([str(values.pop("image_root"))] * len(files))
    if set(shares) != {ALL}:
        values["data_sampling"] = shares
    values |= {"is_reward_customized_from_vlm_module": "true", "task_type": "rec"}


def _whole_groups(settings: Settings) -> None:
    """Its scripts start eight processes; fewer accumulate until whole groups are sampled."""
    values = settings.values
    group = int(values.get("num_generations", 8))
    at_once = int(values.get("per_device_train_batch_size", 8)) * int(
        os.environ.get("WORLD_SIZE", "1")
    )
    factor = group // math.gcd(group, at_once)
    if factor > 1:
        steps = int(values.get("gradient_accumulation_steps", 1))
        values["gradient_accumulation_steps"] = str(steps * factor)
        settings.notes.append(
            f"gradient_accumulation_steps: {steps * factor} in place of {steps}, for {at_once} "
            f"completions at a time are no whole groups of {group}"
        )


def _listed(value: Any) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _true(settings: Settings, name: str) -> bool:
    value = str(settings.values.get(name, "false")).lower()
    if value not in (*TRUE, *FALSE):
        raise InputError(f"{name}: expected true or false, got {value!r}")
    return value in TRUE


def _family(settings: Settings) -> str:
    model = str(settings.values.get("model_name_or_path", "")).lower()
    return next((family for family in CUSTOMIZED if family in model), "qwen")


def _rewards(settings: Settings) -> None:
    names, table = _listed(settings.values["reward_funcs"]), REWARDS
    customized = _true(settings, "is_reward_customized_from_vlm_module")
    settings.values.pop("is_reward_customized_from_vlm_module", None)
    if customized:
        task = settings.values["task_type"]
        if task != "rec":
            raise InputError(
                f"task_type: is_reward_customized_from_vlm_module has rewards for rec only, got "
                f"{task!r}"
            )
        table = CUSTOMIZED[_family(settings)]
    for name in names:
        if name not in table and "/" not in name and ":" not in name:
            raise InputError(f"reward_funcs: {name!r} is none of VLM-R1's {', '.join(table)}")
    settings.values["reward_funcs"] = [table.get(name, name) for name in names]
    mapped = [f"{name} is {table[name]}" for name in names if name in table]
    if mapped:
        settings.notes.append(f"reward_funcs: {', '.join(mapped)}")


def _words(settings: Settings) -> None:
    """Its modules of InternVL and GLM ask every task in the words of the default one."""
    task = settings.values["task_type"]
    if _family(settings) != "qwen" and task != "default":
        settings.values["task_type"] = "default"
        settings.notes.append(f"task_type: {task} is asked in VLM-R1's default words here")


def _ignored_there(settings: Settings, known: Container[str]) -> None:
    for name in IGNORED_THERE:
        if name not in settings.values:
            continue
        if name in known:
            settings.notes.append(f"{name}: ignored by VLM-R1, obeyed here")
        else:
            settings.drop(name, "ignored by VLM-R1, and there is nothing to set here")


def _tiles(settings: Settings) -> None:
    if "max_anyres_num" not in settings.values:
        return
    if _family(settings) == "internvl":
        settings.values["max_tiles"] = settings.values.pop("max_anyres_num")
        settings.notes.append("max_anyres_num: is max_tiles here")
    else:
        settings.drop("max_anyres_num", "tiles of InternVL only; limit other images by max_pixels")


def _dropout(settings: Settings) -> None:
    if float(settings.values.get("lora_dropout", 0)) > 0:
        settings.values["lora_dropout"] = "0"
        settings.notes.append(
            "lora_dropout: set to 0, for a prompt shared by its completions has one mask"
        )


def _resume(settings: Settings) -> None:
    value = str(settings.values.get("resume_from_checkpoint", "")).lower()
    if value in (*TRUE, *FALSE):
        settings.drop(
            "resume_from_checkpoint", "a run continues from its newest complete checkpoint (resume)"
        )
        settings.values["resume"] = "true" if value in TRUE else "false"


def _folders(settings: Settings) -> None:
    if settings.values.get("image_folders", "") is True:  # the flag with nothing behind it
        settings.values["image_folders"] = ""
    if "data_file_paths" in settings.values and "image_folders" not in settings.values:
        first = str(settings.values["data_file_paths"]).split(":")[0]
        settings.notes.append(
            f"image_folders: not given, images are looked for in {Path(first).parent}"
        )
