# SPDX-License-Identifier: Apache-2.0
"""What a process of a run that is killed does; `fastgrpo.testing.launch` starts it.

Two epochs of three steps, sampled, saved every two steps. A run leaves empty files in its folder:
`done-N` once N steps are done, `saved-N` once that step is saved.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from job import LORA, build, write
from transformers import TrainerCallback

from fastgrpo.checkpoints import newest_complete
from fastgrpo.integrations.trl import FastGRPOTrainer

SAVING = {
    "optim": "adamw_torch",
    "max_steps": 6,
    "num_rows": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "samples": True,
    "fast": {"self_check": False},
}
CASES = {
    "moving_reference": {
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.6,
    },
    "lora": {"lora": LORA},
    "several_steps_a_generation": {"steps_per_generation": 2, "num_iterations": 2},
    "every_step_saved": {"save_steps": 1, "save_total_limit": 2},
    "evaluated": {
        "eval_rows": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
    },
}
PHASES = {
    "rollout": (FastGRPOTrainer, "_generate_single_turn"),
    "reward": (FastGRPOTrainer, "_calculate_rewards"),
    "forward": (FastGRPOTrainer, "_compute_loss"),
    "backward": (Accelerator, "backward"),
    "optimizer": (AcceleratedOptimizer, "step"),
    "evaluation": (FastGRPOTrainer, "prediction_step"),
}


class Progress(TrainerCallback):
    def __init__(self, folder: Path):
        self.folder = folder
        self.done, self.inside = 0, False

    def _mark(self, state, what):
        if state.is_world_process_zero:
            (self.folder / f"{what}-{state.global_step}").touch()

    def on_train_begin(self, args, state, control, **_):
        self._mark(state, "done")

    def on_step_begin(self, args, state, control, **_):
        self.inside = True

    def on_step_end(self, args, state, control, **_):
        self.done, self.inside = state.global_step, False
        self._mark(state, "done")

    def on_save(self, args, state, control, **_):
        self._mark(state, "saved")


def go_on(output: str, case: str, phase: str = "") -> None:
    """A case in `output`, from its newest whole checkpoint if there is any.

    Killed after that phase of the fifth step, if one is given, or in the evaluation before it.
    """
    output = Path(output)
    start, _ = newest_complete(output)
    trainer = build(output, "fast", SAVING | CASES[case])
    progress = Progress(output)
    trainer.add_callback(progress)
    if phase:
        owner, name = PHASES[phase]
        _die_after(owner, name, lambda: progress.inside or phase == "evaluation", progress)
    trainer.train(resume_from_checkpoint=start and str(start))
    write(trainer, output, "result")


def _die_after(owner, name, there, progress) -> None:
    method = getattr(owner, name)

    def last(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if progress.done >= 4 and there():
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, last)
