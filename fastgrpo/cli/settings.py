# SPDX-License-Identifier: Apache-2.0
"""The settings of a run, from a YAML file and the command line: checked, and each in one line."""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import ModelConfig, TrlParser

from fastgrpo import recipes
from fastgrpo.attention.registry import BACKENDS
from fastgrpo.cli import vlm_r1
from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.errors import InputError
from fastgrpo.losses.types import LOSS_TYPES

logger = logging.getLogger(__name__)

# What transformers would otherwise take over from the checkpoint's generation_config: the loss
# scores the plain softmax, so rollouts sample from it. TRL sets temperature, top_k, top_p and
# repetition_penalty itself.
PLAIN_SAMPLING = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}
_HALF = ("bfloat16", "float16")


class OneLineErrors:
    """Of a parser: what it cannot read is an `InputError`."""

    def error(self, message: str):
        raise InputError(message.removeprefix("argument --").replace("\n", " "))


class _Parser(OneLineErrors, TrlParser):
    pass


def parse(
    arguments: list[str] | None = None, say: Callable[[str], None] = logger.warning
) -> tuple[FastGRPOConfig, ModelConfig]:
    """The settings from `--config` and the command line, checked; `say` gets the lines that tell
    what was done instead of what was written.

    Raises `InputError`, one line naming the setting, for one that is unknown, missing, of a wrong
    kind, or contradicts another.
    """
    parser = _Parser((FastGRPOConfig, ModelConfig), prog="fastgrpo train", allow_abbrev=False)
    names = {option.lstrip("-").replace("-", "_") for option in parser._option_string_actions}
    values = _values(arguments, names, say)
    parser.set_defaults(
        lora_dropout=0.0, bf16=_has_bf16(), dataloader_pin_memory=torch.cuda.is_available()
    )
    if "recipe" in values:
        parser.set_defaults(**recipes.load(str(values["recipe"])).config)
    config, model_config = _built(parser, values)
    _check(config, model_config)
    for note in _in_motion(config):
        say(note)
    if model_config.use_peft and model_config.lora_target_modules is None:
        model_config.lora_target_modules = "all-linear"
    config.generation_kwargs = (
        PLAIN_SAMPLING
        | ({} if config.min_p is None else {"min_p": config.min_p})
        | (config.generation_kwargs or {})
    )
    return config, model_config


def _values(
    arguments: list[str] | None, names: set[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """The settings by name, VLM-R1's in our words, without what this machine cannot do."""
    values = _written(arguments)
    if vlm_r1.is_vlm_r1(values):
        settings = vlm_r1.translate(values, names)
        values = settings.values
        for note in settings.notes:
            say(note)
    _check_names(values, names)
    for note in fit_to_machine(values):
        say(note)
    return values


def _built(parser: _Parser, values: dict[str, Any]) -> tuple[FastGRPOConfig, ModelConfig]:
    try:
        return parser.parse_args_into_dataclasses(args=_as_arguments(values))
    except InputError:
        raise
    except (ValueError, RuntimeError, TypeError, OSError) as error:  # TRL's own checks
        raise InputError(" ".join(str(error).split())) from error


def fit_to_machine(values: dict[str, Any]) -> list[str]:
    """Turns off what this machine cannot do, in place; one line for each."""
    notes = []
    gpu = torch.cuda.is_available() and str(values.get("use_cpu", "")).lower() != "true"

    def drop(name: str, note: str) -> None:
        values.pop(name)
        notes.append(f"{name}: {note}")

    for name in ("bf16", "fp16", "tf32"):
        if str(values.get(name, "false")).lower() in vlm_r1.TRUE and not gpu:
            drop(name, "no GPU here, computing in float32")
            if name == "bf16":
                values["bf16"] = "false"
    if not gpu and values.get("dtype") in _HALF:
        drop("dtype", "no GPU here, weights in float32")
    if not gpu and int(os.environ.get("WORLD_SIZE", "1")) == 1 and "deepspeed" in values:
        drop("deepspeed", "one process without a GPU has nothing to shard")
    attention = str(values.get("attn_implementation", ""))
    if attention.startswith("flash_attention") and not (
        gpu and importlib.util.find_spec("flash_attn")
    ):
        drop(
            "attn_implementation", f"{attention} is not installed here, the model's default is used"
        )
    trackers = values.get("report_to")
    for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
        if tracker in ("wandb", "mlflow", "trackio", "tensorboard", "swanlab"):
            if importlib.util.find_spec(tracker) is None:
                drop("report_to", f"{tracker} is not installed; the log is in trainer_state.json")
                break
    return notes


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _written(arguments: list[str] | None) -> dict[str, Any]:
    """Name -> text, list of texts or True (a flag alone), the command line over the file."""
    given, name = {}, None
    for text in sys.argv[1:] if arguments is None else arguments:
        text = "--help" if text == "-h" else text
        if text.startswith("--"):
            name, equals, value = text[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if equals else []
        elif name is None:
            raise InputError(f"{text!r}: a setting is written --name value")
        else:
            given[name].append(text)
    given = {n: True if not v else v[0] if len(v) == 1 else v for n, v in given.items()}
    return _from_file(given.pop("config", None)) | given


def _from_file(path: Any) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = yaml.safe_load(Path(str(path)).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"config: {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"config: {path} must hold settings, one `name: value` a line")
    for name, value in (data.pop("env", None) or {}).items():
        os.environ[str(name)] = str(value)
    return {str(name): _as_text(value) for name, value in data.items() if value is not None}


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    return [str(_as_text(v)) for v in value] if isinstance(value, list) else str(value)


def _as_arguments(values: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in values.items():
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *value] if value else []
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def _check_names(values: dict[str, Any], names: set[str]) -> None:
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{name}: there is no such setting{hint}")


def _check(config: FastGRPOConfig, model_config: ModelConfig) -> None:
    """What no single setting shows: missing ones, and pairs that exclude each other."""
    if model_config.model_name_or_path is None:
        raise InputError("model_name_or_path is required")
    if config.data_file_paths is None and config.dataset_name is None:
        raise InputError("data_file_paths is required, or dataset_name")
    if config.data_file_paths is not None and config.dataset_name is not None:
        raise InputError("data_file_paths and dataset_name exclude each other")
    if config.val_split_ratio and (config.eval_data_file_paths or config.dataset_test_split):
        other = "eval_data_file_paths" if config.eval_data_file_paths else "dataset_test_split"
        raise InputError(f"val_split_ratio and {other} exclude each other")
    held_out = (config.val_split_ratio, config.eval_data_file_paths, config.dataset_test_split)
    if config.eval_strategy != "no" and not any(held_out):
        raise InputError(
            f"eval_strategy: {config.eval_strategy} needs rows to evaluate: val_split_ratio, "
            "eval_data_file_paths or dataset_test_split"
        )
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise InputError(f"output_dir: {config.output_dir} is a file")
    _check_choice("loss_type", config.loss_type, LOSS_TYPES)
    if config.backend is not None:
        _check_choice("backend", config.backend, BACKENDS)
    _check_choice("reward_compat", config.reward_compat, ("fixed", "upstream"))


def _in_motion(config: FastGRPOConfig) -> list[str]:
    """What stages and growing data need of the other settings; set, or `InputError`."""
    if config.stage_epochs is None and config.growing_rows is None:
        return []
    name = "growing_rows" if config.stage_epochs is None else "stage_epochs"
    if config.data_file_paths is None:
        raise InputError(f"{name}: needs data_file_paths")
    if config.stage_epochs is not None:
        if config.growing_rows is not None:
            raise InputError("stage_epochs and growing_rows exclude each other")
        config.shuffle_dataset = False
        config.num_train_epochs = 1
        return ["stage_epochs: the stages are one epoch (num_train_epochs 1), in their order"]
    if config.growing_rows < 1:
        raise InputError(f"growing_rows: expected a number above 0, got {config.growing_rows}")
    if ":" in config.data_file_paths:
        raise InputError("growing_rows: one file grows; data_file_paths names several")
    if config.val_split_ratio or config.eval_data_file_paths:
        raise InputError("growing_rows: rows to evaluate cannot be set apart from a growing file")
    if config.world_size > 1 or config.dataloader_num_workers:
        raise InputError("growing_rows: one process without dataloader workers reads it")
    return []


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
