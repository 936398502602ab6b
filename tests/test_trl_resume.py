# SPDX-License-Identifier: Apache-2.0
"""Runs that go on from a checkpoint, and what is loaded from one."""

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, distinct_characters, image_row, steps_of  # noqa: E402


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("peft", [False, True])
def test_resume_continues_as_if_never_stopped(checkpoint, tmp_path, peft):
    from peft import LoraConfig

    options = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    if peft:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "fc1", "up_proj"])
    whole = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "whole", **options)
    whole.train()
    parts = tmp_path / "parts"
    build_trainer(FastGRPOTrainer, checkpoint, parts, callbacks=[Stop()], **options).train()
    second = build_trainer(FastGRPOTrainer, checkpoint, parts, **options)
    second.train(resume_from_checkpoint=str(parts / "checkpoint-2"))
    assert [e["loss"] for e in steps_of(second)] == [e["loss"] for e in steps_of(whole)]
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_is_what_from_pretrained_loads(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    reloaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    for a, b in zip(reloaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_best_model_is_loaded_at_the_end(checkpoint, tmp_path):
    from datasets import Dataset

    scores = iter([5.0, 1.0])

    def reward(completions, **columns):
        return (
            [next(scores, 0.0)] * len(completions)
            if len(completions) == 2
            else (distinct_characters(completions))
        )

    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path,
        max_steps=2,
        reward=reward,
        eval_dataset=Dataset.from_list([image_row(0)]),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        num_generations_eval=2,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
    )
    trainer.train()
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    for a, b in zip(best.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
