"""Twenty optimizer steps with the same seeds: TRL's trainer and ours log the same numbers."""

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
METRICS = ("loss", "grad_norm", "reward", "kl")
TOLERANCE = 1e-4
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


def deviation(fast, stock, metrics=METRICS):
    """The largest difference of a metric, relative to its largest value over the run.

    (A policy loss of centred advantages is zero but for rounding on every on-policy step, so no
    single step can be the yardstick.)
    """
    fast, stock = steps_of(fast), steps_of(stock)
    assert len(fast) == len(stock) > 0
    worst = 0.0
    for metric in metrics:
        ours, theirs = ([e[metric] for e in run if metric in e] for run in (fast, stock))
        scale = max(map(abs, theirs), default=0.0)  # no kl without beta
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        worst = max(worst, *(d / max(scale, 1e-12) for d in differences), 0.0)
    return worst


def compare(checkpoint, tmp_path, *, fast=SAME_ROWS, metrics=METRICS, **options):
    stock = build_trainer(StockTrainer, checkpoint, tmp_path / "stock", **options)
    stock.train()
    ours = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "fast", fast=fast, **options)
    ours.train()
    assert any(entry["grad_norm"] > 0 for entry in steps_of(stock))
    return deviation(ours, stock, metrics)


def covering():
    """Every pair of values of (loss, level, beta, iterations) once at least, in 16 runs."""
    for i, loss in enumerate(LOSSES):
        beta, iterations = i % 2, i // 2 % 2
        yield loss, "token", BETAS[beta], ITERATIONS[iterations]
        yield loss, "sequence", BETAS[1 - beta], ITERATIONS[1 - iterations]


def test_the_covering_covers_every_pair():
    rows = list(covering())
    values = (LOSSES, LEVELS, BETAS, ITERATIONS)
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(values[a], values[b]))


def case_name(case):
    return "-".join(map(str, case))


def run_parity(checkpoint, tmp_path, loss, level, beta, iterations):
    worst = compare(
        checkpoint,
        tmp_path,
        loss_type=loss,
        importance_sampling_level=level,
        beta=beta,
        num_iterations=iterations,
    )
    print(f"{loss} {level} beta={beta} iterations={iterations}: {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("case", list(covering()), ids=case_name)
def test_parity(checkpoint, tmp_path, case):
    run_parity(checkpoint, tmp_path, *case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    itertools.product(LOSSES, LEVELS, BETAS, ITERATIONS),
    ids=lambda c: "-".join(map(str, c)),
)
def test_parity_full(checkpoint, tmp_path, case):
    run_parity(checkpoint, tmp_path, *case)
