# SPDX-License-Identifier: Apache-2.0
"""Whose trainer may be accelerated, and what is refused."""

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer  # noqa: E402
from trl_runs import SAME_ROWS, StockTrainer, agree  # noqa: E402

from fastgrpo import InputError  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer, FastOptions, accelerate  # noqa: E402
from fastgrpo.testing.trl import build_trainer, steps_of  # noqa: E402


def test_accelerate_changes_an_instance_of_any_subclass(checkpoint, tmp_path):
    class MyTrainer(StockTrainer):
        def log(self, logs, *args):
            super().log(logs | {"mine": 1.0}, *args)

    options = dict(max_steps=2)
    stock = build_trainer(GRPOTrainer, checkpoint, tmp_path / "s", **options)
    stock.train()
    trainer = build_trainer(GRPOTrainer, checkpoint, tmp_path / "f", **options)
    assert accelerate(trainer, **SAME_ROWS) is trainer
    assert isinstance(trainer, FastGRPOTrainer)
    trainer.train()
    agree(trainer, stock)

    with pytest.raises(InputError, match="_tokenize_prompts is not TRL's own"):
        accelerate(build_trainer(MyTrainer, checkpoint, tmp_path / "m", **options))


def test_accelerate_keeps_a_subclass_methods(checkpoint, tmp_path):
    class MyTrainer(GRPOTrainer):
        def log(self, logs, *args):
            super().log(logs | {"mine": 1.0}, *args)

    trainer = accelerate(build_trainer(MyTrainer, checkpoint, tmp_path, max_steps=1))
    assert type(trainer).__name__ == "FastMyTrainer" and isinstance(trainer, MyTrainer)
    trainer.train()
    assert steps_of(trainer)[0]["mine"] == 1.0
    assert "fastgrpo/self_check_max_abs" in steps_of(trainer)[0]
    with pytest.raises(InputError, match="accelerated already"):
        accelerate(trainer)


def test_a_subclass_of_ours_may_override_what_we_override(checkpoint, tmp_path):
    class Doubled(FastGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | {"advantages": 2 * output["advantages"]}

    runs = [
        build_trainer(cls, checkpoint, tmp_path, max_steps=1, beta=0.0)
        for cls in (FastGRPOTrainer, Doubled)
    ]
    norms = []
    for trainer in runs:
        torch.manual_seed(0)
        trainer.train()
        norms.append(steps_of(trainer)[0]["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)


def liger_forward(self, *args, **kwargs):
    raise NotImplementedError


liger_forward.__module__ = "liger_kernel.transformers.model.qwen2_5_vl"


def patch_model(trainer):
    trainer.model.forward = liger_forward.__get__(trainer.model)


def patch_trainer(trainer):
    trainer._calculate_rewards = lambda *args: None


def patch_class(trainer):
    cls = type(trainer)
    trainer.__class__ = type("Patched", (cls,), {"_prepare_inputs": liger_forward})


def like_ms_swift(trainer):
    """A trainer with the methods of ms-swift 4.6: batches, log-probs and loss of its own."""

    class GRPOTrainer(type(trainer)):
        def _get_per_token_logps_and_entropies(
            self, model, model_inputs, grpo_batch, compute_entropy=False, origin_data=None
        ):
            raise NotImplementedError

        def _prepare_inputs(self, inputs):
            raise NotImplementedError

        def _compute_loss(self, model, model_inputs, grpo_batch, origin_data=None):
            raise NotImplementedError

    for name in ("_get_per_token_logps_and_entropies", "_prepare_inputs", "_compute_loss"):
        vars(GRPOTrainer)[name].__module__ = "swift.rlhf_trainers.grpo_trainer"
    trainer.__class__ = GRPOTrainer


REFUSALS = {
    "_get_per_token_logps_and_entropies is not TRL's own .*swift.*lose its layout": (
        {},
        like_ms_swift,
    ),
    "forward was patched .*liger_kernel": ({}, patch_model),
    "_calculate_rewards is not TRL's own": ({}, patch_trainer),
    "_prepare_inputs is not TRL's own .*liger_kernel": ({}, patch_class),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_would_change_the_numbers_is_refused(checkpoint, tmp_path, message):
    options, patch = REFUSALS[message]
    trainer = build_trainer(GRPOTrainer, checkpoint, tmp_path, **options)
    if patch:
        patch(trainer)
    with pytest.raises(InputError, match=message):
        accelerate(trainer)


def test_a_model_class_patched_before_trl_saw_it_is_not_packed(checkpoint, tmp_path, monkeypatch):
    from transformers import Qwen2_5_VLForConditionalGeneration

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "forward", liger_forward)
    with pytest.raises(InputError, match="strict=True: .*liger_kernel.*not the model's own"):
        build_trainer(FastGRPOTrainer, checkpoint, tmp_path, beta=0.0, fast={"strict": True})


def test_options_are_checked(checkpoint, tmp_path):
    trainer = build_trainer(GRPOTrainer, checkpoint, tmp_path)
    with pytest.raises(InputError, match="unknown option maxtokens; the options are max_tokens"):
        accelerate(trainer, maxtokens=3)
    with pytest.raises(InputError, match="expected a trl.GRPOTrainer, got int"):
        accelerate(3)
    with pytest.raises(InputError, match="liger_kernels=True needs a CUDA device"):
        accelerate(trainer, liger_kernels=True)
    with pytest.raises(InputError, match="backend"):
        build_trainer(
            FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, fast=FastOptions(backend="none")
        ).train()


def test_the_trl_that_ms_swift_needs_is_refused_before_it_is_imported(monkeypatch):
    from fastgrpo.errors import MissingPackage
    from fastgrpo.integrations.trl import version

    version.check_not_older()
    monkeypatch.setattr(version, "version", lambda name: "0.29.1")
    with pytest.raises(MissingPackage, match=r"needs trl 1\.16, 0\.29\.1 is installed.*ms-swift"):
        version.check_not_older()
