# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run goes on: one line a logged step, in place of raw dictionaries."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import Trainer

from fastgrpo.integrations.trl.recorder import StepTimes


def show_lines(trainer: Trainer, times: StepTimes | None = None) -> None:
    """Replaces the printing of transformers' own callbacks; loggers keep every value.

    With the recorder's `times` the bar says which part of a step is under way: a rollout may take
    minutes.
    """
    for own, ours in ((ProgressCallback, LineProgress), (PrinterCallback, LinePrinter)):
        if trainer.pop_callback(own) is not None:
            trainer.add_callback(shown := ours())
            if times is not None and isinstance(shown, LineProgress):
                times.entered = shown.show_part


class StepLines:
    """The line of a logged step; tokens a second are those between two logged steps."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._tokens, self._time = 0.0, now()

    def line(self, logs: dict[str, Any], step: int, steps: int) -> str | None:
        """None for what is no training step: an evaluation, the summary at the end."""
        if "reward" not in logs:
            return None
        rewards = ", ".join(
            f"{name.split('/', 1)[1].removesuffix('/mean')} {float(value):.3f}"
            for name, value in logs.items()
            if name.startswith("rewards/") and name.endswith("/mean")
        )
        parts = [f"step {step}/{steps}", f"reward {float(logs['reward']):.3f} ({rewards})"]
        for name, label in (("kl", "kl"), ("completions/mean_length", "length")):
            if logs.get(name) is not None:
                parts.append(f"{label} {float(logs[name]):.4g}")
        if "step_time" in logs:
            parts.append(f"{float(logs['step_time']):.3g} s")
        parts += self._speed(logs)
        return "  ".join(parts)

    def _speed(self, logs: dict[str, Any]) -> list[str]:
        now, tokens = self._now(), float(logs.get("num_tokens", 0))
        seconds, new = now - self._time, tokens - self._tokens
        self._tokens, self._time = tokens, now
        return [f"{new / seconds:.0f} tokens/s"] if new > 0 and seconds > 0 else []


class LineProgress(ProgressCallback):
    """A progress bar, and a line above it for each logged step."""

    def __init__(self):
        super().__init__()
        self._lines = StepLines()

    def show_part(self, part: str) -> None:
        if self.training_bar is not None:  # in a log file every refresh would be another bar
            self.training_bar.set_postfix_str(part, refresh=sys.stderr.isatty())

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = self._lines.line(logs or {}, state.global_step, state.max_steps)
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(line)


class LinePrinter(PrinterCallback):
    """The lines alone, where bars are turned off."""

    def __init__(self):
        self._lines = StepLines()

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = self._lines.line(logs or {}, state.global_step, state.max_steps)
        if state.is_local_process_zero and line:
            print(line, flush=True)
