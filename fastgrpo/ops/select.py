# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: decided here and nowhere else."""

import functools
import importlib
import importlib.util
import os

import torch

from fastgrpo.errors import InputError

# Fastest first. "reference" is the definition and serves every device.
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "linear_logprob": {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")},
    "linear_grpo_loss": {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")},
    "linear_kl": {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")},
    "grpo_loss": {"cuda": ("triton",), "cpu": ()},
    "group_advantages": {"cuda": ("triton",), "cpu": ()},
    "token_kl": {"cuda": ("triton",)},
    "box_iou": {},
    "pairwise_box_iou": {"cuda": ("triton",), "cpu": ("cpp",)},
    "match_boxes": {"cuda": ("cuda", "cpp"), "cpu": ("cpp",)},
    "average_precision": {"cuda": ("cuda", "cpp"), "cpu": ("cpp",)},
    "shared_prefix_attention": {"cuda": ("triton",)},
    "gather_rows": {"cuda": ("triton", "torch"), "cpu": ("torch",)},
}
# What each implementation needs inside `fastgrpo_kernels`, where it is not the op's own stem.
_TRITON_MODULE = {
    "linear_logprob": "offset_exp",
    "linear_grpo_loss": "offset_exp",
    "pairwise_box_iou": "box_iou",
}
_CPP_SYMBOL = {
    "linear_logprob": "offset_exp",
    "linear_grpo_loss": "offset_exp",
    "linear_kl": "kl_of_logits",
}


def select(op: str, device: torch.device, impl: str | None = None) -> str:
    """The implementation of `op` to run on `device`: the one asked for, or the fastest there is.

    An implementation asked for by name that cannot serve raises InputError with the reason.
    """
    order = ORDER[op].get(device.type, ())
    if impl is None:
        return next((name for name in order if why_not(op, name, device) is None), "reference")
    known = {name for names in ORDER[op].values() for name in names} | {"reference"}
    if impl not in known:
        raise InputError(f"impl: {op} has {sorted(known)}, got {impl!r}")
    reason = why_not(op, impl, device)
    if reason:
        raise InputError(f"impl: {op} cannot run as {impl!r}: {reason}")
    return impl


def constant_when_compiled(function):
    """`torch.compiler.assume_constant_result`; that one imports dynamo with the package."""
    function._dynamo_marked_constant = True
    return function


# Which build and packages are there does not change under a compiled graph.
@constant_when_compiled
def why_not(op: str, impl: str, device: torch.device) -> str | None:
    """The reason why `impl` cannot serve `op` on `device`, or None if it can."""
    if impl == "reference":
        return None
    if impl not in {name for names in ORDER[op].values() for name in names}:
        return "this op has no such implementation"
    if impl == "triton":
        if device.type != "cuda" and not _interpreting():
            return f"Triton kernels need a CUDA device, the tensors are on {device.type}"
        return _module_missing(_TRITON_MODULE.get(op, op))
    if impl not in ORDER[op].get(device.type, ()):
        return f"the {impl} kernel does not serve tensors on {device.type}"
    if impl == "cuda":
        return importlib.import_module("fastgrpo_kernels._cuda").why_missing()
    if impl == "cpp":
        return _extension_missing(_CPP_SYMBOL.get(op, op))
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _module_missing(stem: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"fastgrpo_kernels.{stem}") is None:
        return f"fastgrpo_kernels.{stem} is not in this build"
    return None


@functools.cache
def _extension_missing(symbol: str) -> str | None:
    if importlib.util.find_spec("fastgrpo_kernels._C") is None:
        return "the compiled extension fastgrpo_kernels._C was not built"
    if not hasattr(importlib.import_module("fastgrpo_kernels._C"), symbol):
        return f"this build of fastgrpo_kernels._C has no {symbol}"
    return None
