"""What a TRL trainer must be before it is accelerated; each refusal says why and what to do."""

from __future__ import annotations

import inspect

import torch
import trl
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from fastgrpo import attention
from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter

TRL_SERIES = "1.16."
OVERRIDDEN = (
    "_get_per_token_logps_and_entropies",
    "_tokenize_prompts",
    "_generate_single_turn",
    "_prepare_inputs",
    "_calculate_rewards",
    "_generate_and_score_completions",
)


def check_version() -> None:
    if not trl.__version__.startswith(TRL_SERIES):
        raise InputError(
            f"trl {trl.__version__} is installed; this integration replaces methods of trl "
            f"{TRL_SERIES}* and knows no other. Install trl=={TRL_SERIES}* or use fg.GRPOStep."
        )


def check_trainer(trainer: GRPOTrainer, own: type) -> None:
    """Raises `InputError` unless every number of `trainer` would stay TRL's.

    `own` is the class whose methods replace TRL's.
    """
    check_version()
    if not isinstance(trainer, GRPOTrainer):
        raise InputError(f"expected a trl.GRPOTrainer, got {type(trainer).__name__}")
    _check_methods(trainer, own)
    _check_options(trainer)
    _check_parallelism(trainer)
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            check_forward(trainer.accelerator.unwrap_model(model))
            Adapter(model)  # refuses a family the engine does not know


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
            raise InputError(
                f"{type(trainer).__name__}.{name} is not TRL's own (it comes from "
                f"{function.__module__}): it would be replaced, so this trainer is refused"
            )


def _check_options(trainer: GRPOTrainer) -> None:
    args = trainer.args
    refused = {
        "torch_compile": args.torch_compile and "the packed row changes its length every step",
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32
        and "log-probabilities are accumulated in float32 already; leave it off",
        "router_aux_loss_coef": trainer.aux_loss_enabled
        and "a packed row shows each prompt once, so the load-balancing loss would differ",
    }
    for option, reason in refused.items():
        if reason:
            raise InputError(f"{option}={getattr(args, option)}: {reason}")
    config = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
    for adapter in config.values():
        if adapter.is_prompt_learning:
            raise InputError(
                f"{type(adapter).__name__} prepends virtual tokens to every row of a batch, which "
                "a packed row cannot express"
            )


def _check_parallelism(trainer: GRPOTrainer) -> None:
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise InputError(f"distributed type {kind} has not been tested with packed rows")
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and max(parallelism.cp_size, parallelism.sp_size) > 1:
        raise InputError(
            "context and sequence parallelism split rows; a packed row holds whole groups"
        )


def check_forward(model: torch.nn.Module) -> None:
    """Raises `InputError` if the forward below TRL's fused head is not the model class's own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = _below_accelerate(base)
    fused = getattr(forward, "__func__", None)
    if fused is None or fused.__code__ not in add_fused_lm_head.__code__.co_consts:
        raise InputError(
            f"{type(base).__name__}.forward was patched after TRL's fused head was added (by "
            f"{getattr(forward, '__module__', type(forward).__name__)}); only one of the two can "
            "compute the log-probabilities"
        )
    closure = dict(zip(fused.__code__.co_freevars, fused.__closure__, strict=True))
    original = closure["original_forward"].cell_contents
    function = getattr(original, "__func__", original)
    if function is not vars(type(base)).get("forward") or not function.__module__.startswith(
        ("transformers.", "transformers_modules.")
    ):
        raise InputError(
            f"{type(base).__name__}.forward is {function.__module__}.{function.__qualname__}, not "
            "the model's own (Unsloth, Liger's fused loss and verl replace it): load the model "
            "without that patch"
        )


def _below_accelerate(model: torch.nn.Module):
    """The forward that accelerate's mixed-precision wrappers call, if it added any."""
    return getattr(model, "_original_forward", model.forward)


def give_back_attention(trainer: GRPOTrainer) -> None:
    """Gives the models the attention they came with, for code that asks for it by name.

    The next packed row takes it again. Not between a forward and its backward: gradient
    checkpointing runs the forward once more.
    """
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            core = Adapter(trainer.accelerator.unwrap_model(model)).core
            if attention.is_installed(core):
                attention.uninstall(core)
