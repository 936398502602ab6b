# SPDX-License-Identifier: Apache-2.0
"""Groups without a gradient: advantages of exactly 0, and no backward for them."""

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import IMAGES, agree, equal_rewards  # noqa: E402

from fastgrpo.advantages.rule import AdvantageRule  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, distinct_characters, steps_of  # noqa: E402


@pytest.mark.parametrize("value", [0.9, 100.1, 10000.1])
def test_equal_rewards_give_advantages_of_exactly_zero(checkpoint, tmp_path, value):
    options = dict(max_steps=1, beta=0.0, num_generations=8, reward=equal_rewards(value))
    ours = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path / "f",
        log_completions=True,
        num_completions_to_print=0,
        **options,
    )
    ours.train()
    assert steps_of(ours)[0]["grad_norm"] == 0.0
    assert steps_of(ours)[0]["fastgrpo/frac_nonzero_advantage"] == 0.0
    assert set(ours._logs["advantages"]) == {0.0}
    as_trl = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path / "t",
        fast={"exact_zero_advantages": False},
        **options,
    )
    as_trl.train()
    assert steps_of(as_trl)[0]["grad_norm"] > 0.0  # TRL's residue moves the policy


def test_unequal_groups_keep_their_advantages(checkpoint, tmp_path):
    def one_equal_group(completions, **columns):
        return [0.9] * 4 + [0.1, 0.9, 0.5, 0.5]

    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, reward=one_equal_group
    )
    trainer.train()
    advantages = list(trainer._logs["advantages"])
    assert advantages[:4] == [0.0] * 4
    assert advantages[4] < -1 < 1 < advantages[5]


@pytest.mark.parametrize(
    "options",
    [
        dict(loss_type="grpo"),
        dict(loss_type="vespo", rule=AdvantageRule()),
        dict(loss_type="gmpo"),
        dict(loss_type="dapo", top_entropy_quantile=0.5),  # TRL's loss on per-token values
    ],
    ids=["grpo", "vespo-rule", "gmpo", "per-token"],
)
def test_groups_without_gradient_are_scored_without_backward(
    checkpoint, tmp_path, monkeypatch, options
):
    from fastgrpo.integrations.trl import loss as fused
    from fastgrpo.integrations.trl import trainer as per_token

    def first_group_equal(completions, **columns):
        return [0.5] * 4 + distinct_characters(completions)[4:]

    with_gradient = []

    def counting(function, argument):
        def spy(*args, **kwargs):
            if torch.is_grad_enabled():
                with_gradient.append(len(args[argument]))
            return function(*args, **kwargs)

        return spy

    monkeypatch.setattr(fused, "loss_of_groups", counting(fused.loss_of_groups, 2))
    monkeypatch.setattr(per_token, "score", counting(per_token.score, 1))
    options |= dict(max_steps=2, beta=0.0, rows=IMAGES, reward=first_group_equal)
    runs = []
    for skip in (True, False):
        fast = {"skip_zero_gradient": skip, "self_check": False}  # which scores two rows more
        runs.append(build_trainer(FastGRPOTrainer, checkpoint, tmp_path, fast=fast, **options))
        torch.manual_seed(0)
        runs[-1].train()
    agree(*runs, ("loss", "grad_norm", "entropy"))
    assert with_gradient == [4] * 2 + [8] * 2


def test_every_group_without_gradient_is_a_zero_step(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, beta=0.0, reward=equal_rewards(0.5)
    )
    trainer.train()
    assert [(e["loss"], e["grad_norm"]) for e in steps_of(trainer)] == [(0.0, 0.0)] * 2
    assert all(e["entropy"] > 0 for e in steps_of(trainer))
