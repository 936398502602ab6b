# SPDX-License-Identifier: Apache-2.0
"""Saves that fail and checkpoints that were touched: what a run does with them."""

import contextlib
import errno
import io
import json
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
from fastgrpo.testing.models import tiny_model  # noqa: E402
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


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3"))  # stored under other names; the same
@pytest.mark.parametrize(("layers", "wrong"), ((1, "has"), (5, "lacks")))
def test_a_model_of_more_or_fewer_layers_is_refused(tmp_path, family, layers, wrong):
    rows = [{"prompt": [{"role": "user", "content": f"find {i}"}]} for i in range(8)]
    first = save_checkpoint(tmp_path / "model", family)
    trained(first, tmp_path / "run", max_steps=1, rows=rows)
    model = tiny_model(family, text={"num_hidden_layers": layers})
    shutil.copytree(first, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    resume = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(InputError, match=f"checkpoint-1 is of another model: it {wrong} .*layers"):
        trained(tmp_path / "other", tmp_path / "next", resume=resume, rows=rows)


def test_another_version_of_transformers_goes_on_and_is_named(checkpoint, saved, tmp_path, caplog):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved / "checkpoint-1", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "5.16.0"}))
    write_manifest(folder)
    again = trained(checkpoint, tmp_path / "again", resume=str(folder))
    assert "written by transformers 5.16.0" in caplog.text
    whole = torch.load(saved / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    ours = again.optimizer.state_dict()["state"]
    assert all(torch.equal(ours[i]["exp_avg"], whole[i]["exp_avg"]) for i in whole)


def test_a_quota_that_ends_leaves_whole_checkpoints_only(checkpoint, saved, tmp_path, monkeypatch):
    """Network file systems report it when a file is synced."""
    output = tmp_path / "run"
    shutil.copytree(saved, output)
    shutil.rmtree(output / "checkpoint-2")
    with monkeypatch.context() as patch:
        full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
            trained(checkpoint, output, resume=str(output / "checkpoint-1"))
    assert newest_complete(output) == (output / "checkpoint-1", [])
    trained(checkpoint, output, resume=True)
    assert newest_complete(output)[0] == output / "checkpoint-2"


def test_a_folder_that_cannot_be_written_ends_the_run_before_it_trains(checkpoint, tmp_path):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "run", max_steps=1)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run").chmod(0o500)
    before = os.geteuid()
    try:
        if before == 0:  # who may write anywhere
            os.seteuid(65534)
        with pytest.raises(InputError, match="output_dir: .*run cannot be written: Permission"):
            trainer.train()
    finally:
        os.seteuid(before)
    assert trainer.state.global_step == 0


def test_an_interrupted_run_goes_on_in_the_same_process(checkpoint, tmp_path):
    """Ctrl-C in a notebook: the first trainer is still there when the second one trains."""

    class Interrupted(FastGRPOTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(*args, **kwargs)

    # What a shell runs in the background ignores the signal.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    saving = dict(max_steps=2, save_strategy="steps", save_steps=1, optim="adamw_torch")
    first = build_trainer(Interrupted, checkpoint, tmp_path, **saving)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    signal.signal(signal.SIGINT, interrupts)
    assert signal.getsignal(signal.SIGTERM) is before
    assert trained(checkpoint, tmp_path, resume=True).state.global_step == 2
