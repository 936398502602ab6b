# SPDX-License-Identifier: Apache-2.0
"""When the padded path of TRL runs instead of packed rows: judged before training, said once."""

from __future__ import annotations

import inspect
import logging

import torch
from trl import GRPOTrainer

from fastgrpo.errors import InputError
from fastgrpo.integrations.trl.support import fused_forward
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.head import effective_head

logger = logging.getLogger(__name__)

TOOL_IMAGES = "a tool returned images inside a completion"
CUT_IMAGES = (
    "a completion was cut inside a tool's image, and TRL leaves out all images of the batch"
)


class FallbackMixin:
    """Knows whether a batch is packed: `_unserved()` is None, or the reason why TRL scores it.

    A generation batch is judged as a whole, before its old log-probs are computed, so that old and
    new ones come from one path.
    """

    def _judge(self) -> None:
        """Judge model and options; a reason is logged with its cost, or raised if `strict`."""
        self._tool_images = {"train": False, "eval": False}
        self._padded_reason = padded_reason(self)
        doubt = self._padded_reason
        extent = "this run computes"
        if doubt is None and self.tools and self._is_vlm and not self._serves_tool_images():
            doubt = "tools of a vision-language model may return images inside a completion"
            extent = "a batch with one computes"
        if doubt is None:
            return
        if self.fast.strict:
            raise InputError(f"strict=True: {doubt}")
        logger.warning(
            "not packed: %s. So %s log-probabilities by TRL's own padded forward: the numbers are "
            "TRL's, and each prompt and its images are encoded once per completion, %d times, with "
            "padding",
            doubt,
            extent,
            self.num_generations,
        )

    def _unserved(self, batch: dict) -> str | None:
        """Why the generation batch of `batch` (its images by TRL's names) is TRL's to score; None:
        it is packed."""
        if self._padded_reason or not self._tool_images[self._mode]:
            return self._padded_reason
        if not self._serves_tool_images():
            return TOOL_IMAGES
        return CUT_IMAGES if batch.get("pixel_values") is None else None

    def _serves_tool_images(self) -> bool:
        adapter = Adapter(self.accelerator.unwrap_model(self.model))
        return adapter.family.serves_images_in_completions

    def _generate_and_score_completions(self, inputs):
        self._tool_images[self._mode] = False
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ):
        self._tool_images[self._mode] |= has_tool_images
        return super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, num_generations, has_tool_images
        )


def padded_reason(trainer: GRPOTrainer) -> str | None:
    """What packed rows cannot express of this trainer, the model's family before anything else."""
    models = [trainer.accelerator.unwrap_model(m) for m in (trainer.model, trainer.ref_model) if m]
    try:
        adapters = [Adapter(model) for model in models]
        for adapter in adapters:
            if all(p.numel() for p in adapter.head.parameters()):  # not a shard of ZeRO-3
                with torch.no_grad():
                    effective_head(adapter.head)
    except InputError as error:
        return str(error)
    policy = adapters[0]
    own = (_option(trainer), _unbalanced(trainer, policy), policy.dropout())
    for reason in (*map(_foreign_forward, adapters), *own):
        if reason:
            return reason
    return None


def _foreign_forward(adapter: Adapter) -> str | None:
    """A forward that is neither the class's own nor inherited from transformers."""
    model = adapter.core
    function = fused_forward(model)
    function = getattr(function, "__func__", function)
    own = inspect.getattr_static(type(model), "forward") is function
    if own and function.__module__.startswith(("transformers.", "transformers_modules.")):
        return None
    return (
        f"{type(model).__name__}.forward is {function.__module__}.{function.__qualname__}, not the "
        "model's own (Unsloth, Liger's fused loss and verl replace it)"
    )


def _option(trainer: GRPOTrainer) -> str | None:
    args = trainer.args
    reasons = {
        "torch_compile": args.torch_compile and "the packed row changes its length every step",
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32 and "the head has another dtype",
    }
    found = ((name, why) for name, why in reasons.items() if why)
    return next((f"{name}={getattr(args, name)}: {why}" for name, why in found), None)


def _unbalanced(trainer: GRPOTrainer, policy: Adapter) -> str | None:
    """Why the load-balancing loss of the policy's experts cannot come from packed rows."""
    if trainer.aux_loss_enabled and not policy.family.routers(policy.core):
        return (
            f"router_aux_loss_coef={trainer.router_aux_loss_coef}: family {policy.family.name!r} "
            "does not say which of its modules are routers"
        )
    return None
