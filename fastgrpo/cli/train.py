# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo train --config x.yaml [--field value]`: GRPO on the user's data."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from fastgrpo import recipes, rewards
from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.cli.data import check_rows, load_data
from fastgrpo.cli.processor import image_tokens, load_processor
from fastgrpo.cli.settings import parse
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl import FastGRPOTrainer, FastOptions, record
from fastgrpo.integrations.trl.progress import show_lines
from fastgrpo.models.adapter import Adapter

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates if asked to, and leaves the model in `output_dir`."""
    # TRL 1.16 calls transformers' methods by their names before 5.23, at every step.
    warnings.filterwarnings("ignore", ".*will be removed in v6", FutureWarning)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config, model_config = parse(arguments)
    trainer = build_trainer(config, model_config)
    show_lines(trainer, record(trainer))
    with getattr(trainer.train_dataset, "feed", contextlib.nullcontext()):
        trainer.train(resume_from_checkpoint=_checkpoint(config, trainer))
    trainer.save_model(config.output_dir)
    trainer.save_state()
    for line in next_lines(config.output_dir, arguments):
        trainer.accelerator.print(line)
    if config.push_to_hub:
        trainer.push_to_hub()
    if hasattr(trainer, "end"):  # transformers >= 5.18: finishes trackers and process groups
        trainer.end()


def next_lines(output_dir: str, arguments: list[str]) -> list[str]:
    """Where the model is, and the commands that come next, ready to be pasted."""
    output = shlex.quote(output_dir)
    return [
        f"model: {Path(output_dir).resolve()}",
        f"curves and completions: fastgrpo report {output}",
        f"figures: fastgrpo eval {output} {shlex.join(arguments)}",
    ]


def build_trainer(config: FastGRPOConfig, model_config: ModelConfig) -> FastGRPOTrainer:
    """The trainer with its model, data and rewards, ready to train."""
    processor = load_processor(config, model_config)
    train, validation = load_data(config, image_tokens(processor))
    check_rows(config, len(train))
    config.model_init_kwargs = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype or "float32",
    } | (config.model_init_kwargs or {})
    options = {option.name: getattr(config, option.name) for option in fields(FastOptions)}
    trainer = FastGRPOTrainer(
        model=model_config.model_name_or_path,
        args=config,
        train_dataset=train,
        eval_dataset=validation if config.eval_strategy != "no" else None,
        processing_class=processor,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
        fast=options,
        **reward_settings(config),
    )
    if config.freeze_vision:
        _vision_tower(trainer.model).requires_grad_(False)
    return trainer


def reward_settings(config: FastGRPOConfig) -> dict:
    """The trainer's rewards: those named, or a recipe's with its rules and its environment."""
    if config.recipe is None:
        functions = [find_reward(name, config.reward_compat) for name in config.reward_funcs]
        weights = config.reward_weights
        if weights is not None and len(weights) != len(functions):
            raise InputError(
                f"reward_weights: {len(weights)} for the {len(functions)} of reward_funcs"
            )
        return {"reward_funcs": functions}
    from fastgrpo.recipes.rewards import build_reward

    recipe = recipes.load(config.recipe)
    if config.reward_weights is None:
        config.reward_weights = recipe.weights
    return {
        "reward_funcs": [
            build_reward(spec, group_size=config.num_generations) for spec in recipe.rewards
        ],
        "rule": recipe.advantages,
        "perception": recipe.perception,
        "environment_factory": recipe.environment_factory,
    }


def find_reward(name: str, compat: str = "fixed") -> Callable:
    """A reward function by its registered name, or from `package.module:function` or
    `path/to/file.py:function`.
    """
    if ":" not in name:
        return rewards.get(name, compat=compat)
    module_name, _, attribute = name.rpartition(":")
    try:
        function = getattr(_module(module_name), attribute)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(f"reward_funcs: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise InputError(f"reward_funcs: {name!r} is not a function")
    return function


def _module(name: str):
    if name.endswith(".py"):
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _vision_tower(model):
    adapter = Adapter(model)
    tower = adapter.family.tower(adapter.core)
    if tower is None:
        raise InputError("freeze_vision: the model has no vision tower")
    return tower


def _checkpoint(config: FastGRPOConfig, trainer: FastGRPOTrainer) -> str | None:
    """Where to resume: the checkpoint named, else the newest complete one, else nowhere."""
    if config.resume_from_checkpoint is not None or not config.resume:
        return config.resume_from_checkpoint
    checkpoint = trainer.newest_checkpoint()
    if checkpoint is not None:
        logger.warning("resuming from %s", checkpoint)
    return checkpoint
