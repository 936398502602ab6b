# SPDX-License-Identifier: Apache-2.0
"""Runs of TRL's trainer and of ours with the same seeds, and how far their logs differ."""

from trl import GRPOTrainer

from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.testing.trl import build_trainer, image_row, steps_of

TOLERANCE = 1e-4
CLOCKS = ("step_time", "epoch")
# TRL's own shuffle, so that micro-batches hold the same rows, and its residue in equal groups.
SAME_ROWS = {"keep_groups": False, "exact_zero_advantages": False}
PATHS = ("fused", "per_token")
MIXED = [image_row(0, 1), image_row(1, 0), image_row(2, 2), image_row(3, 1)]
IMAGES = [image_row(i) for i in range(4)]  # stock TRL cannot take a micro-batch of text rows alone


class StockTrainer(GRPOTrainer):
    """TRL's trainer, with [] instead of None for the images of a text row.

    Processors take [] and fail on None, so stock TRL cannot train a batch of both kinds.
    """

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        return prompt_ids, images and [row or [] for row in images], fields


class PerToken(FastGRPOTrainer):
    """A subclass with a loss of its own keeps TRL's loss on packed per-token values."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


def deviation(ours, theirs) -> float:
    """The largest difference of any metric TRL logs, relative to its largest value over the run.

    A policy loss of centred advantages is zero but for rounding on every on-policy step (1e-8): no
    single step can be the yardstick, and no value below 1e-3.
    """
    ours, theirs = ours.state.log_history, theirs.state.log_history
    worst = 0.0
    for metric in {name for entry in theirs for name in entry} - set(CLOCKS):
        if metric.startswith("train_") and metric != "train_loss":
            continue
        a, b = ([e[metric] for e in run if e.get(metric) is not None] for run in (ours, theirs))
        assert len(a) == len(b), metric
        scale = max([1e-3, *map(abs, b)])
        differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
        worst = max(worst, *(d / scale for d in differences), 0.0)
    return worst


def compare(checkpoint, tmp_path, paths=PATHS, fast=SAME_ROWS, **options):
    """Trains stock TRL and ours on each of `paths`; every metric TRL logs agrees. The trainers."""
    stock = build_trainer(StockTrainer, checkpoint, tmp_path / "stock", **options)
    stock.train()
    assert any(entry["grad_norm"] > 0 for entry in steps_of(stock))
    runs = []
    for path in paths:
        cls = FastGRPOTrainer if path == "fused" else PerToken
        ours = build_trainer(cls, checkpoint, tmp_path / path, fast=fast, **options)
        assert ours._per_token == (path == "per_token")
        ours.train()
        worst = deviation(ours, stock)
        print(f"{path} {options}: {worst:.1e}")
        assert worst <= TOLERANCE, path
        runs.append(ours)
    return stock, *runs


def agree(ours, theirs, metrics=("loss", "grad_norm", "reward", "kl", "entropy")):
    ours, theirs = steps_of(ours), steps_of(theirs)
    assert len(ours) == len(theirs) > 0
    for metric in metrics:
        a, b = ([entry[metric] for entry in run if metric in entry] for run in (ours, theirs))
        assert len(a) == len(b) > 0, metric
        scale = max(map(abs, b))
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= TOLERANCE * scale, metric


def train_both(checkpoint, tmp_path, metrics=None, fast=SAME_ROWS, **options):
    """Ours and stock TRL after two steps on `MIXED` rows, agreeing in `metrics`."""
    options = {"max_steps": 2, "rows": MIXED} | options
    runs = []
    for name, cls, extra in (("s", StockTrainer, {}), ("f", FastGRPOTrainer, {"fast": fast})):
        runs.append(build_trainer(cls, checkpoint, tmp_path / name, **extra, **options))
        runs[-1].train()
    stock, ours = runs
    agree(ours, stock, *([metrics] if metrics else []))
    return ours, stock


def equal_rewards(value):
    return lambda completions, **columns: [value] * len(completions)
