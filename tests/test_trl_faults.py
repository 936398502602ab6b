# SPDX-License-Identifier: Apache-2.0
"""Saves that fail and checkpoints that were touched: what a run does with them."""

import contextlib
import io
import os
import pickle
import resource
import shutil
import signal

import pytest
import torch
from safetensors import SafetensorError

pytest.importorskip("trl")

from fastgrpo.checkpoints import newest_complete, write_manifest  # noqa: E402
from fastgrpo.errors import InputError  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, save_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    output = tmp_path_factory.mktemp("run")
    trained(checkpoint, output)
    return output


def trained(checkpoint, output, resume=None, **options):
    torch.manual_seed(0)
    saving = dict(max_steps=2, save_strategy="steps", save_steps=1, optim="adamw_torch")
    trainer = build_trainer(FastGRPOTrainer, checkpoint, output, **(saving | options))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# Bytes a file may have before the disk is "full": each stops the save in another file.
LIMITS = (100, *(pytest.param(n, marks=pytest.mark.slow) for n in (700, 5_000, 200_000)), 40_000)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_disk_that_fills_leaves_whole_checkpoints_only(checkpoint, saved, tmp_path, limit):
    output = tmp_path / "run"
    shutil.copytree(saved, output)
    shutil.rmtree(output / "checkpoint-2")
    assert limit < max(p.stat().st_size for p in (output / "checkpoint-1").iterdir())
    quiet = io.StringIO()  # what is printed must not meet the limit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        try:  # Python ignores SIGXFSZ: a write beyond the limit is an error
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises((OSError, RuntimeError, SafetensorError)):
                trained(checkpoint, output, resume=str(output / "checkpoint-1"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest_complete(output) == (output / "checkpoint-1", [])
    trained(checkpoint, output, resume=True)
    assert newest_complete(output)[0] == output / "checkpoint-2"
    assert not (output / ".saving").exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ("rng_state.pth", "optimizer.pt", "scheduler.pt", "rollout_0.pt"))
def test_a_pickle_in_a_checkpoint_is_not_run(checkpoint, saved, tmp_path, name):
    output, proof = tmp_path / "run", tmp_path / "proof"
    shutil.copytree(saved, output)
    folder = output / "checkpoint-1"
    torch.save({"x": Payload(proof)}, folder / name)
    with pytest.raises(InputError, match=f"incomplete: {name} has|incomplete: {name} is not"):
        trained(checkpoint, output, resume=str(folder))
    write_manifest(folder)  # by whoever put it there
    with pytest.raises(pickle.UnpicklingError):
        trained(checkpoint, output, resume=str(folder))
    assert not proof.exists()


@pytest.mark.parametrize("name", ("model.safetensors", "optimizer.pt", "trainer_state.json"))
def test_a_file_cut_short_is_passed_over(checkpoint, saved, tmp_path, name):
    output = tmp_path / "run"
    shutil.copytree(saved, output)
    path = output / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"checkpoint-2 is incomplete: {name}"):
        trained(checkpoint, output, resume=str(path.parent))
    trainer = trained(checkpoint, output, resume=True, max_steps=3)
    assert trainer.state.global_step == 3
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == [1, 2, 3]  # the second trained again, from the first checkpoint


def test_nothing_to_resume_is_an_error(checkpoint, tmp_path):
    with pytest.raises(InputError, match="resume_from_checkpoint: no whole one in"):
        trained(checkpoint, tmp_path, resume=True)


def test_a_run_cut_after_its_last_step_takes_no_more(checkpoint, saved, tmp_path):
    trainer = trained(checkpoint, tmp_path, resume=str(saved / "checkpoint-2"))
    assert trainer.state.global_step == trainer.state.max_steps == 2
    assert [s["step"] for s in trainer.state.log_history if "loss" in s] == [1, 2]


@pytest.mark.parametrize("other", ({"per_device_train_batch_size": 4}, {"num_generations": 2}))
def test_another_batch_or_group_samples_anew(checkpoint, tmp_path, caplog, other):
    """Resumed inside a generated batch with other numbers of rows, which the batch does not fit."""
    inside = dict(steps_per_generation=2, num_iterations=2, max_steps=2)
    trained(checkpoint, tmp_path, **inside)
    resume = str(tmp_path / "checkpoint-1")
    trainer = trained(checkpoint, tmp_path / "other", resume=resume, **inside | other)
    assert trainer.state.global_step == 2
    assert "sampled for other settings" in caplog.text


def test_another_seed_goes_on_with_the_prompts_of_its_own_order(checkpoint, saved, tmp_path):
    resume = str(saved / "checkpoint-2")
    trainer = trained(checkpoint, tmp_path, resume=resume, max_steps=3, seed=7)
    assert [s["step"] for s in trainer.state.log_history if "loss" in s] == [1, 2, 3]


def test_another_model_is_refused(saved, tmp_path):
    other = save_checkpoint(tmp_path / "model", "qwen2_vl")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        trained(other, tmp_path / "run", resume=str(saved / "checkpoint-1"), max_steps=2)


def test_an_interrupted_run_goes_on_in_the_same_process(checkpoint, tmp_path):
    """Ctrl-C in a notebook: the first trainer is still there when the second one trains."""

    class Interrupted(FastGRPOTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(*args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    saving = dict(max_steps=2, save_strategy="steps", save_steps=1, optim="adamw_torch")
    first = build_trainer(Interrupted, checkpoint, tmp_path, **saving)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert trained(checkpoint, tmp_path, resume=True).state.global_step == 2
