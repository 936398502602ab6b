# SPDX-License-Identifier: Apache-2.0
"""Every setting of `fastgrpo train`: TRL's GRPOConfig and ours, one flat list of fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgrpo.images import MAX_PIXELS
from fastgrpo.integrations.trl.config import RenamedConfig


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class FastGRPOConfig(RenamedConfig):
    """GRPOConfig with the data, rewards and acceleration of `fastgrpo train`."""

    recipe: str | None = _option(
        None, "A published system: its rewards, advantage rule and settings, see fastgrpo.recipes."
    )
    data_file_paths: str | None = _option(
        None, "VLM-R1 JSONL or ShareGPT / LLaVA JSON files, ':' between them."
    )
    image_folders: str | None = _option(
        None, "One image folder per data file, ':' between them; default: the files' own."
    )
    dataset_name: str | None = _option(
        None, "A table in TRL's columns: .parquet, .arrow, .json(l), a folder, or a hub name."
    )
    dataset_config: str | None = _option(None, "Configuration of a hub data set.")
    dataset_train_split: str = _option("train", "Split of dataset_name that is trained on.")
    dataset_test_split: str | None = _option(None, "Split of dataset_name for evaluation.")
    reward_method: str | None = _option(
        None, "accu_reward_method of the rows that name none, one per data file, ':' between them."
    )
    data_sampling: list[str] | None = field(
        default=None,
        metadata={"help": "How much of each data file: all, first:N, end:N, random:N or 5%."},
    )
    stage_epochs: list[int] | None = field(
        default=None,
        metadata={"help": "data_file_paths are stages, in order, each this many times."},
    )
    growing_rows: int | None = _option(
        None, "Rows of an epoch; the data file is appended to while training and read as it grows."
    )
    eval_data_file_paths: str | None = _option(None, "Like data_file_paths, for evaluation.")
    eval_image_folders: str | None = _option(None, "Like image_folders, for evaluation.")
    val_split_ratio: float = _option(0.0, "Share of the training rows set apart for evaluation.")
    task_type: str = _option("rec", "Question template: rec, ic, odLength or default.")
    question_template: str | None = _option(
        None, "Question template in full, with {Question} in it; overrides task_type."
    )
    verify_images: str = _option(
        "header", "What is checked before training: header, decode (every pixel) or none."
    )
    max_image_pixels: int = _option(MAX_PIXELS, "Images with more pixels are set aside unread.")
    min_pixels: int | None = _option(None, "Images are enlarged to at least this many pixels.")
    max_pixels: int | None = _option(None, "Images are reduced to at most this many pixels.")
    max_tiles: int | None = _option(None, "Images are cut into at most this many tiles.")
    reward_funcs: list[str] = field(
        default_factory=lambda: ["vlm_r1/iou", "vlm_r1/format_rec"],
        metadata={"help": "Names known to fastgrpo.rewards, or package.module:function."},
    )
    reward_compat: str = _option(
        "fixed", "'fixed', or 'upstream' to reproduce the published reward code, bugs included."
    )
    freeze_vision: bool = _option(False, "Do not train the vision tower.")
    resume: bool = _option(True, "Continue from the newest complete checkpoint in output_dir.")
    max_tokens: int | None = _option(None, "Longest packed row; default: the engine's own.")
    backend: str | None = _option(None, "Attention implementation; default: the best available.")
    self_check: bool = _option(True, "Compare the first micro-batch with TRL's own values.")
    keep_groups: bool = _option(True, "Shuffle whole groups, not rows, between micro-batches.")
    guard_rewards: bool = _option(True, "Keep running when a reward function fails.")
    reward_timeout: float | None = _option(None, "Seconds a reward function may take per call.")
    exact_zero_advantages: bool = _option(True, "Equal rewards in a group: advantages exactly 0.")
    skip_zero_gradient: bool = _option(True, "No backward for groups without any gradient.")
    packed_rollout: bool | None = _option(
        None, "Sample in packed rows; default: wherever they obey every generation setting."
    )
    strict: bool = _option(False, "Refuse what packed rows cannot express; TRL computes it else.")
    workspace_mb: float | None = _option(
        None, "Memory for a chunk of logits; default: by the free memory of the device."
    )
    keep_activations: bool = _option(
        True, "Checkpointing recomputes only what TRL's memory for the step would not hold."
    )
    keep_prompts: bool = _option(
        True, "The loss goes on from what the rollout computed of prompts and images."
    )
    cuda_graphs: bool = _option(True, "On a GPU, packed rollouts decode by CUDA graphs.")
    max_generation_batches: int = _option(
        1, "Above 1: groups without a gradient give way to fresh prompts, up to so many batches."
    )
    liger_kernels: bool = _option(False, "liger-kernel's layers (not its loss), CUDA only.")
    max_skipped_steps: int = _option(
        10, "Steps in a row whose gradient is not finite before the run ends."
    )
