"""`fastgrpo train --config x.yaml [--field value]`: GRPO on VLM-R1's data with FastGRPOTrainer."""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from fastgrpo import recipes, rewards
from fastgrpo.checkpoints import fault_of, newest_complete
from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.cli.processor import image_tokens, load_processor
from fastgrpo.data import load_vlm_r1, split_validation
from fastgrpo.data.conversation import IMAGE_TOKENS
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl import FastGRPOTrainer, FastOptions, record
from fastgrpo.models.adapter import Adapter

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


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates if asked to, and leaves the model in `output_dir`."""
    config, model_config = parse(arguments)
    trainer = build_trainer(config, model_config)
    record(trainer)
    trainer.train(resume_from_checkpoint=_checkpoint(config))
    trainer.save_model(config.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"model: {Path(config.output_dir).resolve()}")
    if config.push_to_hub:
        trainer.push_to_hub()
    if hasattr(trainer, "end"):  # transformers >= 5.18: finishes trackers and process groups
        trainer.end()


def parse(arguments: list[str] | None = None) -> tuple[FastGRPOConfig, ModelConfig]:
    """The settings from `--config` and the command line, checked."""
    parser = TrlParser((FastGRPOConfig, ModelConfig), prog="fastgrpo train")
    # Dropout draws one mask for a prompt shared by G completions, so the engine refuses it.
    parser.set_defaults(lora_dropout=0.0)
    name = _recipe_name(arguments)
    if name is not None:
        parser.set_defaults(**recipes.load(name).config)
    config, model_config = parser.parse_args_and_config(arguments)
    for name in ("data_file_paths", "image_folders"):
        if getattr(config, name) is None:
            raise InputError(f"{name} is required")
    if model_config.model_name_or_path is None:
        raise InputError("model_name_or_path is required")
    if model_config.use_peft and model_config.lora_target_modules is None:
        model_config.lora_target_modules = "all-linear"
    config.generation_kwargs = (
        PLAIN_SAMPLING
        | ({} if config.min_p is None else {"min_p": config.min_p})
        | (config.generation_kwargs or {})
    )
    return config, model_config


def build_trainer(config: FastGRPOConfig, model_config: ModelConfig) -> FastGRPOTrainer:
    """The trainer with its model, data and rewards, ready to train."""
    processor = load_processor(config, model_config)
    train, validation = load_data(config, image_tokens(processor))
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
        **_reward_settings(config),
    )
    if config.freeze_vision:
        _vision_tower(trainer.model).requires_grad_(False)
    return trainer


def _recipe_name(arguments: list[str] | None) -> str | None:
    """`--recipe` on the command line, else `recipe` in the `--config` file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(arguments)
    if given.recipe is None and given.config is not None:
        data = yaml.safe_load(Path(given.config).read_text("utf-8"))
        return data.get("recipe") if isinstance(data, dict) else None
    return given.recipe


def _reward_settings(config: FastGRPOConfig) -> dict:
    """The trainer's rewards: those named, or a recipe's with its rules."""
    if config.recipe is None:
        functions = [find_reward(name, config.reward_compat) for name in config.reward_funcs]
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
    }


def load_data(config: FastGRPOConfig, tokens: Sequence[str] = IMAGE_TOKENS):
    """(train, validation) datasets; validation None unless a split or evaluation files are set.

    `tokens`: the literal tokens of images, which a text must not hold.
    """
    load = functools.partial(
        load_vlm_r1,
        task_type=config.task_type,
        question_template=config.question_template,
        image_tokens=tokens,
        max_image_pixels=config.max_image_pixels,
        verify_images=config.verify_images,
    )
    output = Path(config.output_dir)
    train = load(
        config.data_file_paths,
        config.image_folders,
        reward_method=config.reward_method,
        quarantine_file=output / "quarantine.jsonl",
    )
    if config.eval_data_file_paths is not None:
        if config.val_split_ratio:
            raise InputError("val_split_ratio and eval_data_file_paths exclude each other")
        return train, load(
            config.eval_data_file_paths,
            config.eval_image_folders or config.image_folders,
            quarantine_file=output / "quarantine_eval.jsonl",
        )
    return split_validation(train, config.val_split_ratio, config.seed)


def find_reward(name: str, compat: str = "fixed") -> Callable:
    """A reward function by its registered name, or from `package.module:function`."""
    if ":" not in name:
        return rewards.get(name, compat=compat)
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"reward_funcs: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise InputError(f"reward_funcs: {name!r} is not a function")
    return function


def _vision_tower(model):
    adapter = Adapter(model)
    tower = adapter.family.tower(adapter.core)
    if tower is None:
        raise InputError("freeze_vision: the model has no vision tower")
    return tower


def _checkpoint(config: FastGRPOConfig) -> str | None:
    """Where to resume: the checkpoint named, else the newest complete one, else nowhere."""
    if config.resume_from_checkpoint is not None:
        fault = fault_of(Path(config.resume_from_checkpoint))
        if fault:
            raise InputError(
                f"resume_from_checkpoint: {config.resume_from_checkpoint} is incomplete: {fault}"
            )
        return config.resume_from_checkpoint
    if not config.resume:
        return None
    checkpoint, skipped = newest_complete(Path(config.output_dir))
    for path, fault in skipped:
        logger.warning("%s is incomplete and skipped: %s", path, fault)
    if checkpoint is None:
        return None
    logger.warning("resuming from %s", checkpoint)
    return str(checkpoint)
