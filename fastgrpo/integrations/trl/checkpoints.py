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
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.utils import RepeatSampler

from fastgrpo.checkpoints import fault_of, newest_complete
from fastgrpo.checkpoints.manifest import publish, sync_folder, write_manifest
from fastgrpo.engine.parallel import load_whole
from fastgrpo.errors import InputError

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

    _found: str | None = None  # a checkpoint that was looked at and is whole
    _train_sampler: EpochSampler | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """TRL's, from a checkpoint that is whole: the one named, or the newest of the run (True).

        Raises `InputError` where the one named is not, or there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.newest_checkpoint()
            if resume_from_checkpoint is None:
                raise InputError(f"resume_from_checkpoint: no whole one in {self.args.output_dir}")
        elif resume_from_checkpoint and resume_from_checkpoint != self._found:
            fault = self._by_first(lambda: fault_of(Path(resume_from_checkpoint)))
            if fault:
                raise InputError(
                    f"resume_from_checkpoint: {resume_from_checkpoint} is incomplete: {fault}"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        """Nothing where the run was cut after its last step: the Trainer would take one more.

        The sampler is told the epoch here: resumed inside one over several processes, it lies
        deeper in accelerate's wrappers than the Trainer looks.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._train_sampler is not None:
            self._train_sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def newest_checkpoint(self) -> str | None:
        """The newest whole checkpoint of the run, the same in every process; None without one."""

        def find() -> str | None:
            checkpoint, skipped = newest_complete(Path(self.args.output_dir))
            for path, fault in skipped:
                logger.warning("%s is incomplete and skipped: %s", path, fault)
            return checkpoint and str(checkpoint)

        self._found = self._by_first(find)
        return self._found

    def _by_first(self, look):
        """What the first process finds: files are read, and hashed, by one."""
        found = [look() if self.accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if type(sampler) is not RepeatSampler:
            return sampler
        self._train_sampler = EpochSampler.of(sampler)
        return self._train_sampler

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
        state["settings"] = self._rollout_settings
        torch.save(state, folder / ROLLOUT.format(rank=self.args.process_index))

    @property
    def _rollout_settings(self) -> dict[str, int]:
        """What the shape and the order of a generated batch depend on."""
        names = ("per_device_train_batch_size", "steps_per_generation", "num_generations")
        world = {"processes": self.accelerator.num_processes, "iterations": self.num_iterations}
        return {name: getattr(self.args, name) for name in names} | world

    def _load_rollout(self, path: Path) -> None:
        """The batch a step is in the middle of; a step of another size samples its own."""
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        settings = self._rollout_settings
        if state.get("settings", settings) == settings:
            self._step, self._buffered_inputs = state["step"], state["inputs"]
        elif state["inputs"] is not None:
            logger.warning(
                "%s was sampled for other settings (%s, now %s) and is not used: the run samples "
                "from its prompts again",
                path,
                state["settings"],
                settings,
            )

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
            self._load_rollout(path)
        reference = Path(checkpoint, REFERENCE)
        if self.args.sync_ref_model and self.ref_model is not None:
            if reference.is_file():
                model = self.accelerator.unwrap_model(self.ref_model)
                load_whole(model, load_file(reference))
            else:
                logger.warning(
                    "%s has no reference model: KL starts from the first one", checkpoint
                )
