"""The data sets of a run, from whichever of its settings names them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.data import load_table, load_vlm_r1, split_validation
from fastgrpo.data.conversation import IMAGE_TOKENS, QUESTION


def load_data(
    config: FastGRPOConfig, tokens: Sequence[str] = IMAGE_TOKENS, folder: Path | None = None
):
    """(train, validation) datasets; validation None unless a split or evaluation files are set.

    `tokens`: the literal tokens of images, which a text must not hold. `folder`: where the rows
    set aside are listed, by default the run's `output_dir`.
    """
    load = functools.partial(
        load_table if config.dataset_name is not None else load_vlm_r1,
        image_tokens=tokens,
        max_image_pixels=config.max_image_pixels,
        verify_images=config.verify_images,
    )
    if config.dataset_name is not None:
        return _tables(config, load, folder or Path(config.output_dir))
    return _files(config, load, folder or Path(config.output_dir))


def _tables(config: FastGRPOConfig, load, output: Path):
    load = functools.partial(
        load,
        config.dataset_name,
        config=config.dataset_config,
        image_folder=config.image_folders,
        question_template=config.question_template or QUESTION,
    )
    train = load(split=config.dataset_train_split, quarantine_file=output / "quarantine.jsonl")
    if config.dataset_test_split is None:
        return split_validation(train, config.val_split_ratio, config.seed)
    file = output / "quarantine_eval.jsonl"
    return train, load(split=config.dataset_test_split, quarantine_file=file)


def _files(config: FastGRPOConfig, load, output: Path):
    load = functools.partial(
        load, task_type=config.task_type, question_template=config.question_template
    )
    train = load(
        config.data_file_paths,
        config.image_folders,
        reward_method=config.reward_method,
        quarantine_file=output / "quarantine.jsonl",
    )
    if config.eval_data_file_paths is None:
        return split_validation(train, config.val_split_ratio, config.seed)
    return train, load(
        config.eval_data_file_paths,
        config.eval_image_folders or config.image_folders,
        quarantine_file=output / "quarantine_eval.jsonl",
    )
