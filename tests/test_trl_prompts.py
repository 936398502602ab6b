# SPDX-License-Identifier: Apache-2.0
"""The trainer's first loss after a rollout goes on from the rollout's prompts and images."""

import pytest
import torch

pytest.importorskip("trl")

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.models.adapter import Adapter  # noqa: E402
from fastgrpo.testing.trl import build_trainer, image_row, steps_of  # noqa: E402

MIXED = [image_row(0, 1), image_row(1, 0), image_row(2, 2), image_row(3, 1)]
IMAGES = [image_row(i) for i in range(4)]
SHAPES = {
    "one micro-batch": {},
    "a micro-batch a group": dict(per_device_train_batch_size=4, gradient_accumulation_steps=2),
    "groups cut": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "two steps a rollout": dict(per_device_train_batch_size=4, steps_per_generation=2),
    "each batch twice": dict(num_iterations=2),
    "checkpointing": dict(gradient_checkpointing=True),
    "reentrant checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "frozen tower": dict(frozen=True),
    "LoRA": dict(peft_config=True),
    "bf16": dict(bf16=True),
}


def trained(checkpoint, output, keep, *, frozen=False, **options):
    """A trainer after four steps, and the patches that the policy's tower was given in each."""
    options = dict(rows=MIXED, max_steps=4, optim="sgd", learning_rate=0.01) | options
    if options.pop("peft_config", False):
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(
            target_modules="all-linear", init_lora_weights=False
        )
    fast = {"keep_prompts": keep, "self_check": False}
    trainer = build_trainer(FastGRPOTrainer, checkpoint, output, fast=fast, **options)
    tower, patches = Adapter(trainer.model).core.model.visual, []
    if frozen:
        tower.requires_grad_(False)

    def count(module, args, kwargs):
        patches.append(len(args[0] if args else kwargs["hidden_states"]))

    tower.register_forward_pre_hook(count, with_kwargs=True)
    torch.manual_seed(0)
    trainer.train()
    assert trainer._prompts is None  # of a step that has ended
    return trainer, patches


@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_without(checkpoint, tmp_path, shape):
    runs = [trained(checkpoint, tmp_path / str(k), k, **SHAPES[shape])[0] for k in (True, False)]
    tolerance = 2e-2 if shape == "bf16" else 1e-4
    alike = 1 if shape == "bf16" else None  # then rounding makes others of the samples
    for ours, plain in zip(*(steps_of(run)[:alike] for run in runs), strict=True):
        for name in plain.keys() & {"loss", "grad_norm", "kl", "entropy", "reward"}:
            assert ours[name] == pytest.approx(plain[name], rel=tolerance, abs=tolerance / 10), name
    if alike:
        return
    for (name, p), (_, q) in zip(*(run.model.named_parameters() for run in runs), strict=True):
        assert torch.allclose(p, q, atol=tolerance / 10, rtol=tolerance), name


@pytest.mark.parametrize("shape", ["one micro-batch", "a micro-batch a group", "bf16"])
def test_each_image_is_encoded_once_a_step(checkpoint, tmp_path, shape):
    options = SHAPES[shape] | dict(rows=IMAGES, beta=0.0)
    kept, plain = (
        sum(trained(checkpoint, tmp_path / str(k), k, **options)[1]) for k in (True, False)
    )
    # of several micro-batches the last one's prompts would wait in memory for the others
    assert (2 * kept if shape != "a micro-batch a group" else kept) == plain


def test_a_loss_per_token_asks_for_nothing(checkpoint, tmp_path):
    class PerToken(FastGRPOTrainer):
        def _compute_loss(self, model, inputs):
            assert self._prompts is None
            return super()._compute_loss(model, inputs)

    build_trainer(PerToken, checkpoint, tmp_path, rows=MIXED, max_steps=1).train()
