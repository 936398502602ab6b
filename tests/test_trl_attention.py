# SPDX-License-Identifier: Apache-2.0
"""Whatever is not ours finds the attention that the model came with."""

import pytest

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from fastgrpo import attention  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import (  # noqa: E402
    build_trainer,
    distinct_characters,
    image_row,
)

ROWS = [image_row(0, 1), image_row(1, 0)]


class Watch(TrainerCallback):
    def __init__(self):
        self.seen, self.trainer = [], None

    def note(self, where: str) -> None:
        for model in filter(None, (self.trainer.model, self.trainer.ref_model)):
            assert not attention.is_installed(model), where
            names = {model.config.text_config._attn_implementation}
            names |= {model.config.vision_config._attn_implementation}
            assert names == {"sdpa"}, where
        self.seen.append(where)

    def on_step_end(self, *args, **kwargs):
        self.note("step")

    def on_evaluate(self, *args, **kwargs):
        self.note("evaluate")

    def on_save(self, *args, **kwargs):
        self.note("save")

    def on_train_end(self, *args, **kwargs):
        self.note("end")


def test_callbacks_rewards_and_the_caller_find_it(checkpoint, tmp_path, monkeypatch):
    watch, installed = Watch(), []
    install = attention.install
    monkeypatch.setattr(
        attention, "install", lambda *args, **kw: (installed.append(1), install(*args, **kw))
    )

    def reward(completions, **columns):
        watch.note("reward")
        return distinct_characters(completions)

    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path,
        rows=ROWS,
        reward=reward,
        eval_dataset=Dataset.from_list(ROWS),
        callbacks=[watch],
        fast={"guard_rewards": False},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    watch.trainer = trainer
    trainer.train()
    watch.note("caller")
    assert set(watch.seen) == {"reward", "step", "evaluate", "save", "end", "caller"}
    assert len(installed) > 4  # and taken again for every packed pass


def test_it_comes_back_from_a_step_that_failed(checkpoint, tmp_path, monkeypatch):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, rows=ROWS, max_steps=1)

    def broken(loss, **kwargs):
        assert attention.is_installed(trainer.model)
        raise RuntimeError("in backward")

    monkeypatch.setattr(trainer.accelerator, "backward", broken)
    with pytest.raises(RuntimeError, match="in backward"):
        trainer.train()
    assert not attention.is_installed(trainer.model)
