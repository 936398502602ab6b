# SPDX-License-Identifier: Apache-2.0
"""What verl must be, and be configured as; each refusal names the field."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Iterator

from fastgrpo.errors import InputError, MissingPackage

logger = logging.getLogger(__name__)

TESTED_VERL = "0.9"
# What is overridden or called, with its parameters in the tested version.
SIGNATURES = {
    "verl.workers.engine.EngineRegistry.register": "model_type backend device vendor",
    "verl.workers.engine.EngineRegistry.get_engine_cls": "model_type backend",
    "verl.workers.engine.FSDPEngineWithLMHead.__init__": "self model_config engine_config "
    "optimizer_config checkpoint_config",
    "verl.workers.engine.FSDPEngineWithLMHead._build_module": "self",
    "verl.workers.engine.FSDPEngineWithLMHead._gradient_sync_context": "self is_last_micro_batch",
    "verl.workers.engine.FSDPEngineWithLMHead.get_data_parallel_size": "self",
    "verl.workers.engine.FSDPEngineWithLMHead.get_data_parallel_group": "self",
    "verl.workers.engine.FSDPEngineWithLMHead.forward_backward_batch": "self data loss_function "
    "forward_only",
    "verl.workers.engine.FSDPEngineWithLMHead.forward_step": "self micro_batch loss_function "
    "forward_only",
    "verl.workers.engine.utils.postprocess_batch_func": "output_lst indices data",
    "verl.workers.engine.utils.detach_tree": "obj",
    "verl.utils.tensordict_utils.assign_non_tensor": "tensor_dict kwargs",
    "verl.utils.tensordict_utils.get": "tensordict key default",
    "verl.utils.tensordict_utils.index_select_tensor_dict": "batch indices",
    "verl.utils.fsdp_utils.get_init_weight_context_manager": "use_meta_tensor mesh",
    "verl.utils.model.get_hf_auto_model_class": "hf_config",
    "verl.utils.device.get_device_id": "",
    "verl.utils.device.get_device_name": "",
    "verl.utils.device.get_vendor": "",
}
# Strategies of other engines: FSDP version 1, and models that are not transformers'.
FOREIGN = ("fsdp", "megatron", "veomni", "torchtitan", "automodel", "fsdp_turbo")


def check_installed() -> None:
    """`MissingPackage` without verl. No extra brings it: its versions of transformers end before
    ours begin, while its engine runs with both."""
    missing = [name for name in ("verl", "tensordict") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackage(
            f"fastgrpo.integrations.verl needs {', '.join(missing)}: pip install --no-deps "
            f'"verl=={TESTED_VERL}.*", and what else it names but transformers',
            name=missing[0],
        )


def check_signatures() -> None:
    """`InputError` naming the first of `SIGNATURES` that the installed verl has otherwise."""
    for path, parameters in SIGNATURES.items():
        found, known = _parameters(path), f"({', '.join(parameters.split())})"
        if found != known:
            verl = importlib.import_module("verl")
            raise InputError(
                f"verl {verl.__version__} is installed, where {path} is {found}, not {known}; "
                f"install verl=={TESTED_VERL}.*"
            )


def _parameters(path: str) -> str:
    parts = path.split(".")
    split = next(
        (i for i, part in enumerate(parts) if part[0].isupper()), len(parts) - 1
    )  # where modules end
    found = importlib.import_module(".".join(parts[:split]))
    for name in parts[split:]:
        found = getattr(found, name, None)
        if found is None:
            return "gone"
    return f"({', '.join(inspect.signature(found).parameters)})"


def check_configuration(model, engine) -> None:
    """`InputError` naming a field of verl's `HFModelConfig` or `FSDPEngineConfig` that packed rows
    cannot obey; one line names those that change nothing here."""
    for field, why in _refusals(model, engine):
        raise InputError(f"{field}: {why}")
    moot = {
        "model.use_fused_kernels": model.use_fused_kernels,
        "fsdp_config.entropy_checkpointing": engine.entropy_checkpointing,
        "fsdp_config.entropy_from_logits_with_chunking": engine.entropy_from_logits_with_chunking,
    }
    if given := [name for name, value in moot.items() if value]:
        logger.warning("%s: nothing to do, packed rows store no logits", ", ".join(given))


def _refusals(model, engine) -> Iterator[tuple[str, str]]:
    if engine.ulysses_sequence_parallel_size > 1:
        yield (
            f"fsdp_config.ulysses_sequence_parallel_size={engine.ulysses_sequence_parallel_size}",
            "a packed row holds whole prompts and is not split over processes; set it to 1",
        )
    if engine.qat.enable:
        yield "fsdp_config.qat.enable=True", "quantized layers have not been tested in packed rows"
    if engine.router_replay.mode != "disabled":
        yield (
            f"fsdp_config.router_replay.mode={engine.router_replay.mode}",
            "recorded experts belong to rows of their own, not to a shared prompt",
        )
    if engine.pad_to_length:
        yield "fsdp_config.pad_to_length=True", "a packed row has no padding; set it to False"
    if model.use_liger:
        yield (
            "model.use_liger=True",
            "Liger's layers have not been tested under verl's engine; set it to False",
        )
    if model.enable_activation_offload:
        yield (
            "model.enable_activation_offload=True",
            "it replaces the layers' forwards, and has not been tested with packed rows",
        )


def check_batch(data, get) -> None:
    """`InputError` naming what a batch asks for that packed rows do not compute; `get(data, key,
    default)` is verl's."""
    if get(data, "distillation_use_topk", False):
        raise InputError("distillation: a teacher's top-k needs logits, which are not stored here")
    if get(data, "calculate_sum_pi_squared", False):
        raise InputError("actor.calculate_sum_pi_squared=True needs logits, which are not stored")
    for key in ("prompts", "responses", "response_mask"):
        if key not in data:
            raise InputError(
                f"the batch has no {key!r}: this engine scores responses to prompts (RL), not "
                "whole sequences (SFT); leave external_lib=fastgrpo.integrations.verl out there"
            )
