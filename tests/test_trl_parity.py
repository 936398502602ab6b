# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps with the same seeds: TRL's trainer and ours log the same numbers.

Twenty steps of every loss, level, beta and number of iterations, with gradient accumulation 1 and
3, on the fused path and the per-token path, are the slow tests; a covering of all pairs of values,
two steps each, runs always.
"""

import itertools

import pytest

pytest.importorskip("trl")

from trl import GRPOTrainer  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, save_checkpoint, steps_of  # noqa: E402

LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
BETAS = (0.0, 0.04)
ITERATIONS = (1, 2)
ACCUMULATION = (1, 3)
PATHS = ("fused", "per_token")
FACTORS = (LOSSES, LEVELS, BETAS, ITERATIONS, ACCUMULATION, PATHS)
TOLERANCE = 1e-4
CLOCKS = ("step_time", "epoch")
# TRL's own shuffle, so that micro-batches hold the same rows, and its residue in equal groups.
SAME_ROWS = {"keep_groups": False, "exact_zero_advantages": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2_5_vl")


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


def deviation(ours, theirs):
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
        scale = max(1e-3, *map(abs, b))
        differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
        worst = max(worst, *(d / scale for d in differences), 0.0)
    return worst


def compare(checkpoint, tmp_path, paths=PATHS, **options):
    """How far each of `paths` is from stock TRL."""
    stock = build_trainer(StockTrainer, checkpoint, tmp_path / "stock", **options)
    stock.train()
    assert any(entry["grad_norm"] > 0 for entry in steps_of(stock))
    for path in paths:
        cls = FastGRPOTrainer if path == "fused" else PerToken
        ours = build_trainer(cls, checkpoint, tmp_path / path, fast=SAME_ROWS, **options)
        assert ours._per_token == (path == "per_token")
        ours.train()
        worst = deviation(ours, stock)
        print(f"{path} {options}: {worst:.1e}")
        assert worst <= TOLERANCE


def settings(loss, level, beta, iterations, accumulation):
    split = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}
    return {
        "loss_type": loss,
        "importance_sampling_level": level,
        "beta": beta,
        "num_iterations": iterations,
        **(split if accumulation == 3 else {}),
    }


def covering():
    """Every pair of values of two factors once at least, in 16 runs."""
    for i, loss in enumerate(LOSSES):
        a, b, c = i & 1, i >> 1 & 1, i >> 2 & 1
        for k in (0, 1):
            yield (
                loss,
                LEVELS[k],
                BETAS[a ^ k],
                ITERATIONS[b ^ k],
                ACCUMULATION[c ^ k],
                PATHS[a ^ b ^ c ^ k],
            )


def test_the_covering_covers_every_pair():
    rows = list(covering())
    for a, b in itertools.combinations(range(len(FACTORS)), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(FACTORS[a], FACTORS[b]))


def case_name(case):
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", list(covering()), ids=case_name)
def test_parity(checkpoint, tmp_path, case):
    compare(checkpoint, tmp_path, case[-1:], max_steps=2, **settings(*case[:-1]))


@pytest.mark.slow
@pytest.mark.parametrize("case", itertools.product(*FACTORS[:-1]), ids=case_name)
def test_parity_full(checkpoint, tmp_path, case):
    compare(checkpoint, tmp_path, max_steps=20, **settings(*case))
