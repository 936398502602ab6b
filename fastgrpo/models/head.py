# SPDX-License-Identifier: Apache-2.0
"""The projection to the vocabulary, taken over for the length of one forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from fastgrpo.errors import InputError

SOFTCAP = "final_logit_softcapping"  # transformers' name for it in a config


@contextlib.contextmanager
def replaced_head(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `head(hidden)` returns function(hidden).

    Only `forward` of this instance changes: the module is still called where the model calls it,
    so hooks that gather its weights (ZeRO-3, FSDP) fire as always.
    """
    previous = head.__dict__.get("forward")
    head.forward = function
    try:
        yield
    finally:
        if previous is None:
            del head.forward
        else:
            head.forward = previous


@contextlib.contextmanager
def without_softcap(config) -> Iterator[None]:
    """Inside, a model with this text config returns what its head returns, not capped."""
    cap = getattr(config, SOFTCAP, None)
    if cap is None:
        yield
        return
    setattr(config, SOFTCAP, None)
    try:
        yield
    finally:
        setattr(config, SOFTCAP, cap)


def effective_head(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(V, D) weight and (V,) bias the head applies now, differentiable in all of its parts.

    LoRA: W + sum over the active adapters of scaling * B @ A. `InputError` for a head this cannot
    express (quantized, DoRA, LoRA with a bias) and for a weight that is not gathered.
    """
    if hasattr(head, "modules_to_save"):  # PEFT: a trained copy stands in for the original
        if head.disable_adapters or not head.active_adapters:
            return effective_head(head.original_module)
        return effective_head(head.modules_to_save[head.active_adapters[0]])
    if hasattr(head, "base_layer"):
        weight, bias = effective_head(head.base_layer)
        if head.disable_adapters or head.merged:
            return weight, bias
        for name in head.active_adapters:
            if name in head.lora_A:
                weight = weight + _lora_delta(head, name).to(weight.dtype)
        return weight, bias
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        came = (
            f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
        )
        if isinstance(weight, Tensor) and weight.numel() == 0:
            came += "; a ZeRO-3 shard that its owner did not gather"
        raise InputError(
            f"lm_head is a {type(head).__name__} with {came}; a (V, D) float is needed"
        )
    return weight, getattr(head, "bias", None)


def _lora_delta(head: nn.Module, name: str) -> Tensor:
    a, b = head.lora_A[name], head.lora_B[name]
    if getattr(head, "lora_variant", {}).get(name) is not None:
        raise InputError(f"lm_head: adapter {name!r} is a LoRA variant (DoRA, ...), not plain LoRA")
    if b.bias is not None:
        raise InputError(f"lm_head: adapter {name!r} has a LoRA bias, which is not supported")
    if a.weight.numel() == 0 or b.weight.numel() == 0:
        raise InputError(f"lm_head: adapter {name!r} is an ungathered ZeRO-3 shard")
    return head.scaling[name] * (b.weight @ a.weight)
