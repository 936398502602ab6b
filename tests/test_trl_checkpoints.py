# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or absent, and a resumed run repeats the one that was not cut."""

import json
import os
import signal

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback  # noqa: E402

from fastgrpo.checkpoints import fault_of, newest_complete  # noqa: E402
from fastgrpo.errors import InputError  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, steps_of  # noqa: E402

SAVING = dict(save_strategy="steps", save_steps=1, optim="adamw_torch", learning_rate=1e-3)
SAME = ("loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length")


def trained(checkpoint, output, *, resume=None, **options):
    torch.manual_seed(0)
    trainer = build_trainer(FastGRPOTrainer, checkpoint, output, **(SAVING | options))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same_run(resumed, whole):
    first = len(steps_of(whole)) - len(steps_of(resumed))
    ours = {step["step"]: step for step in steps_of(resumed)}
    for step in steps_of(whole)[max(first, 0) :]:
        for name in SAME:
            if name in step:
                assert ours[step["step"]][name] == step[name], (step["step"], name)
    for (name, a), (_, b) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


# 8 prompts, 2 a step: 4 steps are an epoch. Resumed inside the second epoch, inside a generated
# batch that serves several steps, and with a reference model that moves.
@pytest.mark.parametrize(
    "options",
    (
        {"max_steps": 7},
        {"max_steps": 5, "steps_per_generation": 2, "num_iterations": 2},
        {"max_steps": 5, "sync_ref_model": True, "ref_model_sync_steps": 1, "beta": 0.1},
    ),
    ids=("second_epoch", "inside_a_generation", "moving_reference"),
)
def test_resumed_run_equals_the_uninterrupted_one(checkpoint, tmp_path, options):
    if "ref_model_sync_steps" in options:
        options = options | {"ref_model_mixup_alpha": 0.6}
    whole = trained(checkpoint, tmp_path / "run", **options)
    at = tmp_path / "run" / f"checkpoint-{options['max_steps'] - 2}"
    resumed = trained(checkpoint, tmp_path / "again", resume=str(at), **options)
    same_run(resumed, whole)


def test_a_checkpoint_lists_its_files_and_the_pointer_names_it(checkpoint, tmp_path):
    trained(checkpoint, tmp_path, max_steps=3, save_total_limit=2)
    folders = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert folders == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "latest").read_text() == "checkpoint-3"
    assert not (tmp_path / ".saving").exists()
    newest = tmp_path / "checkpoint-3"
    listed = json.loads((newest / "manifest.json").read_text())
    assert set(listed) == {p.name for p in newest.iterdir()} - {"manifest.json"}
    assert fault_of(newest, 3) is None
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert "model.safetensors is not the file that was saved" in fault_of(newest, 3)
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_the_best_checkpoint_is_named_by_its_final_folder(checkpoint, tmp_path):
    from datasets import Dataset

    from fastgrpo.testing.trl import image_row

    trainer = trained(
        checkpoint,
        tmp_path,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=Dataset.from_list([image_row(i) for i in range(2)]),
        metric_for_best_model="eval_reward",
        load_best_model_at_end=True,
        per_device_eval_batch_size=8,
    )
    best = trainer.state.best_model_checkpoint
    assert best in (str(tmp_path / "checkpoint-1"), str(tmp_path / "checkpoint-2"))
    stored = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == best


def test_no_room_leaves_the_last_checkpoint_and_says_so(checkpoint, tmp_path, monkeypatch, caplog):
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(
        "fastgrpo.integrations.trl.checkpoints.shutil.disk_usage",
        lambda path: real(path)._replace(free=1000),
    )
    trained(checkpoint, tmp_path, max_steps=2)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert "step 2 is not saved" in caplog.text


def test_a_second_writer_is_refused(checkpoint, tmp_path):
    import fcntl

    tmp_path.mkdir(exist_ok=True)
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("process 7")
        held.flush()
        with pytest.raises(InputError, match="output_dir: .* is being written by process 7"):
            trained(checkpoint, tmp_path, max_steps=1)


class At(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


def test_sigterm_saves_and_ends(checkpoint, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = trained(
        checkpoint,
        tmp_path,
        max_steps=6,
        save_steps=100,
        callbacks=[At(1, lambda: os.kill(os.getpid(), signal.SIGTERM))],
    )
    assert trainer.state.global_step == 2
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_without_a_finite_gradient_changes_nothing(checkpoint, tmp_path):
    """A poisoned gradient in step 2 of 3: parameters and Adam's moments stay those of step 1."""
    seen = []

    class Poisoned(FastGRPOTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1:
                next(self.model.parameters()).grad.fill_(float("nan"))
            seen.append([p.detach().clone() for p in self.model.parameters()])
            return loss

    torch.manual_seed(0)
    trainer = build_trainer(Poisoned, checkpoint, tmp_path, max_steps=3, learning_rate=1e-3)
    trainer.train()
    assert all(map(torch.equal, seen[1], seen[2]))
    assert not all(map(torch.equal, seen[0], seen[1]))
    skipped = [step.get("fastgrpo/skipped_steps", 0.0) for step in steps_of(trainer)]
    assert skipped == [0.0, 1.0, 0.0]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_run_of_bad_steps_ends_the_run(checkpoint, tmp_path):
    class Poisoned(FastGRPOTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            next(self.model.parameters()).grad.fill_(float("inf"))
            return loss

    trainer = build_trainer(
        Poisoned, checkpoint, tmp_path, max_steps=5, fast={"max_skipped_steps": 2}
    )
    with pytest.raises(FloatingPointError, match="3. step in a row"):
        trainer.train()
    assert trainer.state.global_step == 2
