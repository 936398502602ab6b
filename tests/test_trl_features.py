# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen tower: encoded once for a generation batch, at TRL's numbers."""

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, image_row, steps_of  # noqa: E402

ROWS = [image_row(i) for i in range(4)]
# Two prompts a generation, two optimizer steps for each, sampled log-probs and a reference.
BATCH = dict(rows=ROWS, max_steps=4, num_iterations=2, beta=0.1, learning_rate=0.01, optim="sgd")


def frozen(cls, checkpoint, output, **options):
    trainer = build_trainer(cls, checkpoint, output, **(BATCH | options))
    trainer.model.model.visual.requires_grad_(False)
    return trainer


def patches_of(trainer):
    """The patches that each call of a tower, the policy's or the reference's, is given."""
    patches = []
    for model in filter(None, (trainer.model, trainer.ref_model)):
        model.model.visual.register_forward_pre_hook(
            lambda m, args, kwargs: patches.append(
                len(args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
    return patches


def test_each_image_is_encoded_once_for_all_passes(checkpoint, tmp_path):
    trainer = frozen(FastGRPOTrainer, checkpoint, tmp_path, fast={"self_check": False})
    patches, seen = patches_of(trainer), []
    generate = trainer._generate_and_score_completions

    def watched(inputs):
        output = generate(inputs)
        rows = output["image_grid_thw"].prod(-1).split(output["num_images"])
        seen.append(
            sum(
                {
                    tuple(r["prompt"][0]["content"]): int(n.sum())
                    for r, n in zip(inputs, rows, strict=True)
                }.values()
            )
        )
        return output

    trainer._generate_and_score_completions = watched
    trainer.train()
    assert len(seen) == 2 and sum(patches) == sum(seen)


@pytest.mark.parametrize("change", ("trained", "another_tower", "moving_reference"))
def test_features_that_differ_are_not_shared(checkpoint, tmp_path, change):
    options = {"sync_ref_model": True} if change == "moving_reference" else {}
    trainer = frozen(FastGRPOTrainer, checkpoint, tmp_path, **options)
    trainer._features = object()
    if change == "trained":
        trainer.model.model.visual.merger.requires_grad_(True)
        assert trainer._kept_features(trainer.model) is None
        return
    assert trainer._kept_features(trainer.model) is trainer._features
    if change == "another_tower":
        with torch.no_grad():
            next(trainer.ref_model.model.visual.parameters())[0] += 1e-3
    assert trainer._kept_features(trainer.ref_model) is None


def test_the_numbers_are_those_of_trl(checkpoint, tmp_path):
    ours = frozen(FastGRPOTrainer, checkpoint, tmp_path / "ours", fast={"keep_groups": False})
    theirs = frozen(GRPOTrainer, checkpoint, tmp_path / "theirs")
    for trainer in (ours, theirs):
        torch.manual_seed(0)
        trainer.train()
    for a, b in zip(steps_of(ours), steps_of(theirs), strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy", "reward"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    for (name, p), (_, q) in zip(
        ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        assert torch.allclose(p, q, atol=1e-6, rtol=1e-5), name
