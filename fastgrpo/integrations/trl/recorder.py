# SPDX-License-Identifier: Apache-2.0
"""Makes a TRL GRPO run leave what its report needs: where the time of a step went, and which image
a row saw.

TRL sends its own `profiling/...` figures to wandb, mlflow or trackio only, and its completions
files hold no images. `record(trainer)` puts the times into the trainer's log as `time/<part>`
(seconds per optimizer step, so they reach `trainer_state.json`), the columns that name the image
and the solution into the completions, and every log entry into `log.jsonl` as it is made.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from fastgrpo.integrations.trl.frames import drawn_frames
from fastgrpo.integrations.trl.run_log import RunLog

# Method -> the part of the step its own time counts as, callees that are parts themselves left out.
PARTS = {
    "training_step": "backward",
    "_prepare_inputs": "prepare",
    "_generate_single_turn": "generate",
    "_calculate_rewards": "rewards",
    "_get_per_token_logps_and_entropies": "old and reference log-probs",
    "compute_loss": "policy forward",
}
OPTIMIZER = "optimizer"
COLUMNS = ("image_path", "solution")


class StepTimes(TrainerCallback):
    """Exclusive wall-clock seconds of each part, summed over an optimizer step.

    On CUDA a part's time is the host's: kernels still running when it returns count to the next
    part that waits.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.entered: Callable[[str], None] = lambda part: None  # told which part begins
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[list] = []  # [part, seconds of its callees] of the calls under way

    def timed(self, function: Any, part: str) -> Any:
        @functools.wraps(function)
        def call(*args, **kwargs):
            inside_loss = any(name == PARTS["compute_loss"] for name, _ in self._open)
            name = PARTS["compute_loss"] if inside_loss else part
            frame = [name, 0.0]
            self._open.append(frame)
            self.entered(name)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self._open.pop()
                self.seconds[name] += elapsed - frame[1]
                if self._open:
                    self._open[-1][1] += elapsed

        return call

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._optimizer_start = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.seconds[OPTIMIZER] += time.perf_counter() - self._optimizer_start

    def on_step_end(self, args, state, control, **kwargs) -> None:
        for part, seconds in self.seconds.items():
            self.trainer._metrics["train"][f"time/{part}"].append(seconds)
        self.seconds.clear()


def record(trainer: Any) -> StepTimes:
    """Attaches the recorder to a TRL `GRPOTrainer` (or a subclass) before `train()`.

    Call it after `accelerate(trainer)`, which refuses a trainer whose methods were wrapped.
    """
    times = StepTimes(trainer)
    calculate_rewards = trainer._calculate_rewards

    @functools.wraps(calculate_rewards)
    def with_columns(inputs, prompts, completions, *args):
        for column in COLUMNS:
            if inputs and column in inputs[0]:
                trainer._log_completion_extra(column, [_plain(row[column]) for row in inputs])
        if hasattr(trainer, "with_frames"):
            frames = drawn_frames(trainer._unguarded, trainer.with_frames(inputs), completions)
            if frames is not None:
                trainer._log_completion_extra("frames", frames)
        return calculate_rewards(inputs, prompts, completions, *args)

    trainer._calculate_rewards = with_columns
    for method, part in PARTS.items():
        setattr(trainer, method, times.timed(getattr(trainer, method), part))
    trainer.add_callback(times)
    trainer.add_callback(RunLog())
    return times


def _plain(value: Any) -> Any:
    """A value that every row of a parquet column can share: text, or a list of text or numbers."""
    return list(value) if isinstance(value, (list, tuple)) else str(value)
