# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments: every run resumes, and goes on as if it had not been cut.

`make test-faults KILLS=100` runs that many trials, over all kinds of run; they are forked from one
process that has everything imported.
"""

import json
import os
import random
import signal
import time
import traceback

import pytest
import torch
from compare import needs

pytest.importorskip("trl")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from fastgrpo.checkpoints import newest_complete  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.launch import MODES  # noqa: E402
from fastgrpo.testing.trl import build_trainer, image_row, save_checkpoint, steps_of  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("FASTGRPO_KILLS", "100"))
STEPS, EVERY = 10, 2  # 4 steps are an epoch
RUNS = {
    "moving_reference": dict(
        sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.6, beta=0.1
    ),
    "lora": dict(lora=True),
    "several_steps_a_generation": dict(steps_per_generation=2, num_iterations=2),
    "every_step_saved": dict(save_steps=1, save_total_limit=2),
}

KINDS = (*RUNS, *MODES)


def trials(kind: str) -> range:
    """This kind's share of KILLS."""
    return range(KINDS.index(kind), KILLS, len(KINDS))


class Progress(TrainerCallback):
    step, inside = 0, False  # of this process

    def __init__(self, path):
        self.path = path

    def on_step_begin(self, args, state, control, **_):
        Progress.inside = True

    def on_step_end(self, args, state, control, **_):
        Progress.step, Progress.inside = state.global_step, False
        self.path.write_text(str(state.global_step))


def train(checkpoint, output, options, result=None):
    """One run in `output`, resumed where it holds a whole checkpoint."""
    from peft import LoraConfig

    options = dict(options)
    if options.pop("lora", False):
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"])
    torch.manual_seed(0)
    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        output,
        **dict(
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=EVERY,
            optim="adamw_torch",
            callbacks=[Progress(output / "progress")],
        )
        | options,
    )
    start, _ = newest_complete(output)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if result is not None:
        parameters = {n: p.detach() for n, p in trainer.model.named_parameters()}
        torch.save(parameters, result.with_suffix(".pt"))
        first = 0 if start is None else int(start.name.split("-")[1])
        result.write_text(json.dumps({"resumed_from": first, "steps": steps_of(trainer)}))


def forked(function, *arguments):
    """The process id of a child that runs the function and exits with 0, or 1 if it raised."""
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finished(*arguments):
    """Whether the forked function came to its end; killed it did not, and an error is an error."""
    status = os.waitpid(forked(*arguments), 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return status == 0


@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_repeat_the_uninterrupted_one(tmp_path, name):
    options, draw = RUNS[name], random.Random(name)
    checkpoint = save_checkpoint(tmp_path / "model")
    whole = tmp_path / "whole"
    whole.mkdir()
    began = time.monotonic()
    assert os.waitpid(forked(train, checkpoint, whole, options, whole / "result.json"), 0)[1] == 0
    duration = time.monotonic() - began
    expected = {s["step"]: s for s in json.loads((whole / "result.json").read_text())["steps"]}
    parameters = torch.load(whole / "result.pt", weights_only=True)
    cut = 0
    for trial in trials(name):
        output = tmp_path / f"trial-{trial}"
        output.mkdir()
        pid = forked(train, checkpoint, output, options)
        time.sleep(draw.uniform(0.1, 1.0) * duration)
        os.kill(pid, signal.SIGKILL)
        cut += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        progress = output / "progress"
        done = int(progress.read_text() or 0) if progress.exists() else 0
        result = output / "result.json"
        assert os.waitpid(forked(train, checkpoint, output, options, result), 0)[1] == 0, trial
        got = json.loads(result.read_text())
        assert got["resumed_from"] >= done - options.get("save_steps", EVERY), (trial, done)
        for step in got["steps"]:
            for metric in ("loss", "grad_norm", "reward", "kl"):
                # Rewards are logged by the step that samples them.
                assert step.get(metric) == expected[step["step"]].get(metric), (trial, metric)
        for key, value in torch.load(result.with_suffix(".pt"), weights_only=True).items():
            assert torch.equal(value, parameters[key]), (trial, key)
    print(f"{name}: {len(trials(name))} runs, {cut} of them killed before their end, all resumed")


def killed_in(owner, name):
    """Ends the process after `owner.name` in the fifth step, or in the evaluation before it."""
    method = getattr(owner, name)

    def ends(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if Progress.step >= 4 and (Progress.inside or name == "prediction_step"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, ends)


PHASES = {
    "rollout": (FastGRPOTrainer, "_generate_single_turn"),
    "reward": (FastGRPOTrainer, "_calculate_rewards"),
    "forward": (FastGRPOTrainer, "_compute_loss"),
    "backward": (Accelerator, "backward"),
    "optimizer": (AcceleratedOptimizer, "step"),
    "evaluation": (FastGRPOTrainer, "prediction_step"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_each_phase_repeats_the_uninterrupted_one(tmp_path, phase):
    checkpoint = save_checkpoint(tmp_path / "model")
    rows = Dataset.from_list([image_row(i) for i in range(2)])
    options = dict(max_steps=6, eval_strategy="steps", eval_steps=1, eval_dataset=rows)
    options["per_device_eval_batch_size"] = 8

    def cut(*arguments):
        killed_in(*PHASES[phase])
        train(*arguments)

    whole, output = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, output):
        folder.mkdir()
    assert finished(train, checkpoint, whole, options, whole / "result.json")
    assert not finished(cut, checkpoint, output, options)
    assert (output / "progress").read_text() == "4"
    assert finished(train, checkpoint, output, options, output / "result.json")
    got, expected = (json.loads((f / "result.json").read_text()) for f in (output, whole))
    assert got["resumed_from"] == (2 if phase == "evaluation" else 4)
    same = [[step[m] for m in ("loss", "grad_norm")] for step in got["steps"]]
    assert same == [[step[m] for m in ("loss", "grad_norm")] for step in expected["steps"]]
    ours, theirs = (torch.load(f / "result.pt", weights_only=True) for f in (output, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("mode", MODES)
def test_killed_processes_repeat_the_uninterrupted_run(launch, models, mode):
    needs(mode)
    folder, draw = models / f"killed-{mode}", random.Random(mode)
    whole = folder / "whole"
    whole.mkdir(parents=True)
    began = time.monotonic()
    launch(mode, "go_on", whole)
    duration = time.monotonic() - began
    expected = {s["step"]: s for s in json.loads((whole / "result.json").read_text())}
    parameters = torch.load(whole / "result.pt", weights_only=True)
    cut = 0
    for trial in trials(mode):
        output = folder / f"trial-{trial}"
        output.mkdir()
        cut += not launch(mode, "go_on", output, kill_after=draw.uniform(0.1, 1.0) * duration)
        progress = output / "progress"
        done = int(progress.read_text() or 0) if progress.exists() else 0
        start, _ = newest_complete(output)
        first = int(start.name.split("-")[1]) if start else 0
        assert first >= done - EVERY, (trial, done)
        launch(mode, "go_on", output)
        for step in json.loads((output / "result.json").read_text()):
            for metric in ("loss", "grad_norm", "reward", "kl"):
                assert step.get(metric) == expected[step["step"]].get(metric), (trial, metric)
        for key, value in torch.load(output / "result.pt", weights_only=True).items():
            assert torch.equal(value, parameters[key]), (trial, key)
    print(f"{mode}: {len(trials(mode))} runs, {cut} of them killed before their end, all resumed")
