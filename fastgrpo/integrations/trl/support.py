# SPDX-License-Identifier: Apache-2.0
"""What a TRL trainer must be before it is accelerated; each refusal says why and what to do."""

from __future__ import annotations

import inspect
import logging

import torch
import trl
from packaging.version import Version
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from fastgrpo.errors import InputError
from fastgrpo.integrations.trl.version import TESTED_TRL

logger = logging.getLogger(__name__)

# TRL's methods that are replaced or called, with their parameters in the tested version.
METHODS = {
    "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep "
    "batch_size compute_entropy compute_aux_loss pixel_values image_grid_thw num_images "
    "pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids mm_token_type_ids "
    "image_position_ids",
    "_compute_loss": "model inputs",
    "training_step": "model inputs num_items_in_batch",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    "_get_train_sampler": "dataset",
    "_tokenize_prompts": "prompts",
    "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
    "_generate": "prompts",
    "_prepare_inputs": "generation_batch",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "inputs",
    "_save_checkpoint": "model trial",
    "_load_optimizer_and_scheduler": "checkpoint",
}
# Another class's version of one of these would be replaced and its effect lost.
OVERRIDDEN = (
    "_get_per_token_logps_and_entropies",
    "_tokenize_prompts",
    "_generate_single_turn",
    "_prepare_inputs",
    "_calculate_rewards",
    "_generate_and_score_completions",
)
# Trainers of these packages derive from TRL's: what of theirs a packed row cannot keep.
FOREIGN = {
    "swift": "ms-swift's templates make its batches, and a hook of theirs on the model's forward "
    "keeps the arguments it knows alone, so a packed row would lose its layout"
}


def check_version() -> bool:
    """Whether this trl is the tested one; `InputError` names what another one does differently."""
    tested = Version(trl.__version__).release[:2] == Version(TESTED_TRL).release
    if tested:
        return True
    for name, parameters in METHODS.items():
        method = getattr(GRPOTrainer, name, None)
        found = "gone"
        if method is not None:
            found = f"({', '.join(list(inspect.signature(method).parameters)[1:])})"
        known = f"({', '.join(parameters.split())})"
        if found != known:
            raise InputError(
                f"trl {trl.__version__} is installed, where GRPOTrainer.{name} is {found}, not "
                f"{known}. Install trl=={TESTED_TRL}.* or use fg.GRPOStep"
            )
    return False


def check_trainer(trainer: GRPOTrainer, own: type, *, self_check: bool = True) -> None:
    """Raises `InputError` unless every number of `trainer` would stay TRL's.

    `own` is the class whose methods replace TRL's.
    """
    tested = check_version()
    if not isinstance(trainer, GRPOTrainer):
        raise InputError(f"expected a trl.GRPOTrainer, got {type(trainer).__name__}")
    if not tested and not self_check:
        raise InputError(f"self_check=False with trl {trl.__version__}, which only it can accept")
    _check_methods(trainer, own)
    _check_parallelism(trainer)
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            fused_forward(core_model(trainer.accelerator.unwrap_model(model)))
    if not tested:
        logger.warning(
            "trl %s has not been tested with fastgrpo (%s has): its methods have the parameters "
            "that were known, and the self-check compares the first micro-batch",
            trl.__version__,
            TESTED_TRL,
        )


def _check_methods(trainer: GRPOTrainer, own: type) -> None:
    if GRPOTrainer.__module__ != "trl.trainer.grpo_trainer":
        raise InputError(
            f"trl.GRPOTrainer was replaced by {GRPOTrainer.__module__}.{GRPOTrainer.__name__}; two "
            "accelerations of one trainer cannot be combined"
        )
    for name in OVERRIDDEN:
        # A subclass of ours overrides on purpose; anything between us and TRL would be replaced.
        below = [
            cls
            for cls in type(trainer).__mro__
            if not (issubclass(cls, own) or cls in own.__mro__[:-1])
        ]
        owner = next(cls for cls in below if name in vars(cls))
        function = inspect.unwrap(vars(owner)[name])
        patched = name in vars(trainer) or function.__module__ != "trl.trainer.grpo_trainer"
        if owner is not GRPOTrainer or patched:
            why = FOREIGN.get(function.__module__.split(".")[0], "it would be replaced")
            raise InputError(
                f"{type(trainer).__name__}.{name} is not TRL's own (it comes from "
                f"{function.__module__}): {why}, so this trainer is refused"
            )


def _check_parallelism(trainer: GRPOTrainer) -> None:
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED"):
        raise InputError(f"distributed type {kind} has not been tested with packed rows")
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise InputError("FSDP version 1 has not been tested with packed rows; set fsdp_version: 2")
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and max(parallelism.cp_size, parallelism.sp_size) > 1:
        raise InputError(
            "context and sequence parallelism split rows; a packed row holds whole groups"
        )


def fused_forward(model: torch.nn.Module):
    """The model's forward below TRL's fused head; `InputError` if the head is not on top."""
    forward = getattr(model, "_original_forward", model.forward)  # accelerate's mixed precision
    fused = getattr(forward, "__func__", None)
    takes = inspect.signature(fused, follow_wrapped=False).parameters if fused else {}
    if "fused_lm_head" not in takes:
        raise InputError(
            f"{type(model).__name__}.forward was patched after TRL's fused head was added (by "
            f"{getattr(forward, '__module__', type(forward).__name__)}); only one of the two can "
            "compute the log-probabilities"
        )
    below = inspect.getclosurevars(fused).nonlocals.get("original_forward")
    if below is None:
        raise InputError(f"trl {trl.__version__}: {add_fused_lm_head.__name__} hides the forward")
    return below


def core_model(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
