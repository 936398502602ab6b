# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run hand one another beside the loss: whole weights, logged images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate.utils import gather_object
from torch import nn
from trl.models import unwrap_model_for_generation

from fastgrpo.engine.parallel import is_zero3, whole_weights


@contextlib.contextmanager
def whole_policy(trainer) -> Iterator[nn.Module]:
    """The policy with whole weights in every process, gathered once.

    Processes stop sampling at different steps, so no forward inside may be a collective. The
    memory is that of the whole model, in each process.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_zero3(model):
        with (
            _without_root_hook(trainer.model_wrapped),
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
        ):
            yield model
        return
    with whole_weights(model):
        yield model


@contextlib.contextmanager
def _without_root_hook(engine: nn.Module) -> Iterator[None]:
    """TRL takes off DeepSpeed's hooks but the root's first, which compares the processes' traces.

    That is a collective in every forward (`PartitionedParameterCoordinator.reset_step`).
    """
    optimizer = engine.optimizer
    offload = getattr(optimizer, "parameter_offload", optimizer)
    hooks, key = offload.module._forward_pre_hooks, offload.fwd_pre_hook.id
    hook = hooks.pop(key)
    try:
        yield
    finally:
        hooks[key] = hook
        hooks.move_to_end(key, last=False)


class GatheringMixin:
    """Collectives that TRL enters only where a process has images, entered by all of them."""

    _log_images = False  # in place of TRL
    _images: list | None = None  # those of the batch at hand, row by row

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        if self._log_images:
            self._images = generated[6]
        return generated

    def _generate_and_score_completions(self, inputs):
        self._log_images = self.accelerator.num_processes > 1 and self.log_multimodal
        if not self._log_images:
            return super()._generate_and_score_completions(inputs)
        self.log_multimodal = False
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.log_multimodal = True
        # A rollout function returns none: the rows' own.
        images = gather_object(self._images or [row.get("images") for row in inputs])
        if any(images):
            self._logs["images"].extend(images)
        return output
