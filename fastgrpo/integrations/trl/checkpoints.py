# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, and that hold all a run needs to repeat itself.

A checkpoint is written to `.saving/checkpoint-N` in the output folder, synced to disk, listed in
its own manifest (size and SHA-256 of every file) and renamed to `checkpoint-N`; then `latest`
names it, and only then older ones are removed. A process killed at any point leaves whole
checkpoints and at most one folder in `.saving`, which the next save replaces.

Beside what transformers saves, it keeps the generated batch a step is in the middle of, the
position in it, and the reference model if it moves.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.utils import RepeatSampler

from fastgrpo.checkpoints.manifest import publish, sync_folder, write_manifest

logger = logging.getLogger(__name__)

SAVING = ".saving"
ROLLOUT, REFERENCE = "rollout_{rank}.pt", "reference.safetensors"
SPARE = 1.2  # free space wanted, in sizes of the last checkpoint


class EpochSampler(RepeatSampler):
    """TRL's sampler, able to begin at any epoch: epoch e shuffles with the (e + 1)-th draw of its
    generator, which is what an uninterrupted run of TRL sees.
    """

    @classmethod
    def of(cls, sampler: RepeatSampler) -> EpochSampler:
        """The sampler with the arguments of TRL's."""
        return cls(
            sampler.data_source,
            sampler.mini_repeat_count,
            sampler.batch_size,
            sampler.repeat_count,
            sampler.shuffle,
            sampler.seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of `epoch`."""
        if not self.shuffle or self.seed is None:
            return
        self.generator.manual_seed(self.seed)
        for _ in range(epoch):
            torch.randperm(self.num_samples, generator=self.generator)


class CheckpointMixin:
    """Saving and resuming of a TRL trainer by whole checkpoints; see the module."""

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler.of(sampler) if type(sampler) is RepeatSampler else sampler

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, SAVING) if getattr(self, "_saving", False) else run_dir

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged = run_dir / SAVING / name
        if not self._agree(self._has_room(run_dir)):
            return
        if self.args.should_save:
            shutil.rmtree(run_dir / SAVING, ignore_errors=True)
            staged.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self._save_rollout(staged)
        self._save_reference(staged)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._finish(staged, run_dir / name)
        self.accelerator.wait_for_everyone()

    def _finish(self, staged: Path, final: Path) -> None:
        """Turns the staged folder into the checkpoint."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staged.parent:
            self.state.best_model_checkpoint = str(final.parent / Path(best).name)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        write_manifest(staged)
        if final.exists():  # saved before at this step, in a run that was resumed from an older one
            final.replace(staged.parent / "replaced")
        staged.replace(final)
        sync_folder(final.parent)
        publish(final)
        shutil.rmtree(staged.parent, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _has_room(self, run_dir: Path) -> bool:
        """Whether the last checkpoint would fit again; a line says so where it would not."""
        last = max(run_dir.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime, default=None)
        if last is None or not self.args.should_save:
            return True
        wanted = SPARE * sum(p.stat().st_size for p in last.rglob("*") if p.is_file())
        free = shutil.disk_usage(run_dir).free
        if free >= wanted:
            return True
        logger.error(
            "step %d is not saved: %s has %.1f GB free and a checkpoint needs %.1f GB; the newest "
            "one is %s",
            self.state.global_step,
            run_dir,
            free / 1e9,
            wanted / 1e9,
            last.name,
        )
        return False

    def _agree(self, yes: bool) -> bool:
        """Whether every process says yes."""
        votes = torch.tensor([yes], device=self.accelerator.device)
        return bool(self.accelerator.gather(votes).all())

    def _save_rollout(self, folder: Path) -> None:
        """This process's generated batch, where the next step goes on in it."""
        every = self.args.steps_per_generation * self.num_iterations
        middle = self._step % every != 0
        state = {"step": self._step, "inputs": self._buffered_inputs if middle else None}
        torch.save(state, folder / ROLLOUT.format(rank=self.args.process_index))

    def _save_reference(self, folder: Path) -> None:
        if not self.args.sync_ref_model or self.ref_model is None:
            return
        weights = self.accelerator.get_state_dict(self.ref_model)
        if self.args.should_save:
            save_file({n: w.contiguous().clone() for n, w in weights.items()}, folder / REFERENCE)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, ROLLOUT.format(rank=self.args.process_index))
        if path.is_file():
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = state["step"], state["inputs"]
        reference = Path(checkpoint, REFERENCE)
        if self.args.sync_ref_model and self.ref_model is not None:
            if reference.is_file():
                self.ref_model.load_state_dict(load_file(reference))
            else:
                logger.warning(
                    "%s has no reference model: KL starts from the first one", checkpoint
                )
