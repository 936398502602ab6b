# SPDX-License-Identifier: Apache-2.0
"""The trainer's model itself: liger-kernel's layers, and weights read back from a checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from fastgrpo.engine.parallel import in_shards
from fastgrpo.errors import InputError

logger = logging.getLogger(__name__)


def load_renamed(model: nn.Module, checkpoint: str | Path) -> bool:
    """Loads weights that `save_pretrained` stored under other names than the model's own.

    transformers 5 saves Qwen-VL models under their first names ("visual.*"), and its Trainer
    resumes with `load_state_dict(strict=False)`, which then loads nothing and says so in a warning
    only. False if the names agree or the model is wrapped or sharded: the Trainer's own way, which
    reads FSDP's or DeepSpeed's files, is right then. `InputError` where the checkpoint is of
    another model, which that warning would pass too.
    """
    if not isinstance(model, PreTrainedModel) or in_shards(model):
        return False
    stored, own = stored_names(checkpoint), model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        own.pop(name, None)
    if stored <= set(own):
        if stored:
            _check_names(own, stored, checkpoint)
        return False
    written = json.loads(Path(checkpoint, "config.json").read_text()).get("transformers_version")
    if written != transformers.__version__:  # the Trainer's own way warns of it
        logger.warning(
            "%s was written by transformers %s, this is %s",
            checkpoint,
            written,
            transformers.__version__,
        )
    loaded = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    _check_names(own, set(loaded), checkpoint)
    model.load_state_dict(loaded)
    return True


def _check_names(own: dict[str, Tensor], stored: set[str], checkpoint: str | Path) -> None:
    """Raises `InputError` unless the stored parameters are the model's own; a tied one counts under
    any of its names."""
    held = {own[name].data_ptr() for name in stored & set(own)}
    absent = [name for name in own if name not in stored and own[name].data_ptr() not in held]
    foreign = sorted(stored - set(own))
    if absent or foreign:
        what = f"lacks {absent[0]}" if absent else f"has {foreign[0]}, which this model has not"
        raise InputError(
            f"resume_from_checkpoint: {checkpoint} is of another model: it {what} "
            f"({len(absent) + len(foreign)} such parameters)"
        )


def stored_names(checkpoint: str | Path) -> set[str]:
    """The parameter names in a folder's safetensors files; empty if it has none."""
    index = Path(checkpoint, "model.safetensors.index.json")
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    single = Path(checkpoint, "model.safetensors")
    if not single.is_file():
        return set()
    with safe_open(single, framework="pt") as file:
        return set(file.keys())


def apply_liger_layers(trainer: GRPOTrainer) -> None:
    """Swaps the model's RMSNorm, rotary embedding and SwiGLU for liger-kernel's, not its loss."""
    device = trainer.accelerator.device
    if device.type != "cuda":
        raise InputError(f"liger_kernels=True needs a CUDA device, the model is on {device}")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        raise InputError(f"liger_kernels=True needs liger-kernel installed: {error}") from error
    for model in filter(None, (trainer.model, trainer.ref_model)):
        model = trainer.accelerator.unwrap_model(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if base.config.model_type not in known:
            raise InputError(f"liger-kernel has no layers for {base.config.model_type}")
        apply(
            base,
            rope=True,
            rms_norm=True,
            swiglu=True,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
