# SPDX-License-Identifier: Apache-2.0
"""The data sets of a run, from whichever of its settings names them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.data import load_table, load_vlm_r1, split_validation
from fastgrpo.data.conversation import IMAGE_TOKENS, QUESTION
from fastgrpo.data.growing import load_growing
from fastgrpo.data.motion import in_stages
from fastgrpo.data.opened import check_verification
from fastgrpo.data.vlm_r1 import RowReader, sources, template_of
from fastgrpo.errors import InputError


def load_data(
    config: FastGRPOConfig, tokens: Sequence[str] = IMAGE_TOKENS, folder: Path | None = None
):
    """(train, validation) datasets; validation None unless a split or evaluation files are set.

    `tokens`: the literal tokens of images, which a text must not hold. `folder`: where the rows
    set aside are listed, by default the run's `output_dir`.
    """
    output = folder or Path(config.output_dir)
    if config.growing_rows is not None:
        return _growing(config, tokens, output), None
    load = functools.partial(
        load_table if config.dataset_name is not None else load_vlm_r1,
        image_tokens=tokens,
        max_image_pixels=config.max_image_pixels,
        verify_images=config.verify_images,
    )
    if config.dataset_name is not None:
        return _tables(config, load, output)
    return _files(config, load, output)


def check_rows(config: FastGRPOConfig, rows: int) -> None:
    """`InputError` for rows that fill no batch of prompts: TRL's sampler leaves out one that is not
    full, and the run would end without a step.
    """
    completions = config.generation_batch_size
    prompts = completions // config.num_generations
    if rows < prompts:
        raise InputError(
            f"per_device_train_batch_size: {completions} completions are sampled at once, of "
            f"{prompts} prompts, and the data has {rows} rows"
        )


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
    file = output / "quarantine.jsonl"
    train = load(
        config.data_file_paths,
        config.image_folders,
        reward_method=config.reward_method,
        sampling=config.data_sampling,
        seed=config.seed,
        quarantine_file=file,
    )
    if config.stage_epochs is not None:
        train = _staged(config, train)
    if config.eval_data_file_paths is None:
        return split_validation(train, config.val_split_ratio, config.seed)
    return train, load(
        config.eval_data_file_paths,
        config.eval_image_folders or config.image_folders,
        quarantine_file=output / "quarantine_eval.jsonl",
    )


def _staged(config: FastGRPOConfig, train):
    """The data files one after the other, each `stage_epochs` times."""
    files = config.data_file_paths.split(":")
    if len(files) != len(config.stage_epochs):
        raise InputError(
            f"stage_epochs: {len(config.stage_epochs)} counts for {len(files)} of data_file_paths"
        )
    if config.val_split_ratio:
        raise InputError("stage_epochs and val_split_ratio exclude each other")
    of_file = Counter(row.rpartition(":")[0] for row in train["data_row"])
    sizes = [of_file[file] for file in files]
    quarantined = train.quarantined
    train = in_stages(train, sizes, seed=config.seed, epochs=config.stage_epochs)
    train.quarantined = quarantined
    return train


def _growing(config: FastGRPOConfig, tokens: Sequence[str], output: Path):
    """The rows of a file that is appended to; what lets them grow is the data set's `feed`."""
    (file,), (folder,), (method,) = sources(
        config.data_file_paths, config.image_folders, config.reward_method
    )
    template = template_of(config.task_type, config.question_template)
    check_verification(config.verify_images, config.max_image_pixels)
    checks = (tokens, config.verify_images, config.max_image_pixels)
    reader = RowReader(file, folder, template, method, *checks)
    dataset, dataset_feed = load_growing(
        reader, config.growing_rows, quarantine_file=output / "quarantine.jsonl"
    )
    dataset.feed = dataset_feed
    return dataset
