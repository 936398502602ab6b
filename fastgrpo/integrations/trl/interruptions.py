# SPDX-License-Identifier: Apache-2.0
"""Runs that end well: SIGTERM saves first, one writer a folder, no step without a number."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import signal
import threading
from pathlib import Path
from typing import IO

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from fastgrpo.errors import InputError

logger = logging.getLogger(__name__)

LOCK = ".lock"


class SaveOnTerm(TrainerCallback):
    """On SIGTERM the step in progress is finished, a checkpoint saved and training ended.

    Any process may get the signal; all of them look at the same step and stop together.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.asked = False
        self._previous = None

    def on_train_begin(self, args, state, control, **_):
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args, state, control, **_):
        asked = torch.tensor([self.asked], device=self.accelerator.device)
        if not bool(self.accelerator.gather(asked).any()):
            return
        logger.warning("SIGTERM: training ends at step %d", state.global_step)
        control.should_save = str(args.save_strategy) != "no" or control.should_save
        control.should_training_stop = True

    def release(self) -> None:
        """Gives the signal back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _ask(self, *_):
        self.asked = True


class OneWriter(TrainerCallback):
    """Refuses an output folder that another running process writes to.

    The lock is the kernel's (flock): it goes with the process, however that ends. The processes
    of one run are refused together.
    """

    def __init__(self):
        self._file = None

    def on_train_begin(self, args, state, control, **_):
        folder = Path(args.output_dir)
        found = gather_object([self._take(folder) if args.should_save else (None, None)])
        fault, owner = next(filter(any, found), (None, None))
        if fault or owner:
            self.release()
        if fault:
            raise InputError(f"output_dir: {folder} cannot be written: {fault}")
        if owner:
            raise InputError(
                f"output_dir: {folder} is being written by {owner}; give each run its own"
            )

    def _take(self, folder: Path) -> tuple[str | None, str | None]:
        """Takes the folder; the system's reason against it, and who has it already, if anybody."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / LOCK).open("a+")
        except OSError as error:
            return error.strerror, None
        owner = _owner(self._file)
        if owner is not None:
            return None, owner
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()}")
        self._file.flush()
        return None, None

    def release(self) -> None:
        """Gives the folder back."""
        if self._file is not None:
            self._file.close()
            self._file = None


def writer_of(folder: Path) -> str | None:
    """The process that writes a run into `folder`, if there is one."""
    try:
        with (folder / LOCK).open() as file:
            return _owner(file)
    except FileNotFoundError:
        return None


def _owner(file: IO[str]) -> str | None:
    """Locks a folder's file; who has done so already, if anybody."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    return None


class ReleasingMixin:
    """However a run ends, SIGTERM and the output folder are free for the next one."""

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (SaveOnTerm, OneWriter)):
                    callback.release()


class FiniteStepsMixin:
    """An optimizer step whose gradient is not finite changes nothing.

    It is counted in `fastgrpo/skipped_steps`, and the run ends after `fast.max_skipped_steps` of
    them in a row. DeepSpeed steps inside its backward, so there the run ends at the first.
    """

    _skipped = 0  # in a row

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None or math.isfinite(float(norm)):
            self._skipped = 0
            return norm
        self._skipped += 1
        self._metrics["train"]["fastgrpo/skipped_steps"].append(1.0)
        limit = self.fast.max_skipped_steps
        if self.is_deepspeed_enabled or self._skipped > limit:
            raise FloatingPointError(
                f"step {self.state.global_step}: the gradient norm is {float(norm)}, for the "
                f"{self._skipped}. step in a row; the last checkpoint is from before it"
            )
        logger.warning(
            "step %d: the gradient norm is %s; this step changes no parameter (%d of at most %d in "
            "a row)",
            self.state.global_step,
            float(norm),
            self._skipped,
            limit,
        )
        self.optimizer.zero_grad(set_to_none=True)
        return norm
