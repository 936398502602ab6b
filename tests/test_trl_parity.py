# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps with the same seeds: TRL's trainer and ours log the same numbers.

Twenty steps of every loss, level, beta and number of iterations, with gradient accumulation 1 and
3, on the fused path and the per-token path, are the slow tests; a covering of all pairs of values,
two steps each, runs always.
"""

import itertools

import pytest

pytest.importorskip("trl")

from trl_runs import PATHS, SAME_ROWS, compare  # noqa: E402

LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
BETAS = (0.0, 0.04)
ITERATIONS = (1, 2)
ACCUMULATION = (1, 3)
FAST = SAME_ROWS | {"self_check": False}  # stock TRL itself is the check here
FACTORS = (LOSSES, LEVELS, BETAS, ITERATIONS, ACCUMULATION, PATHS)


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
    compare(checkpoint, tmp_path, case[-1:], fast=FAST, max_steps=2, **settings(*case[:-1]))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(itertools.product(*FACTORS[:-1])), ids=case_name)
def test_parity_full(checkpoint, tmp_path, case):
    compare(checkpoint, tmp_path, fast=FAST, max_steps=20, **settings(*case))
