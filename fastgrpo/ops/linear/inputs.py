# SPDX-License-Identifier: Apache-2.0
"""The arguments that every projection op takes: checked once, in the form the ops use."""

from typing import NamedTuple

import torch

from fastgrpo.checks import check_positive, check_targets, check_tensor
from fastgrpo.errors import InputError
from fastgrpo.ops.select import select


class Projection(NamedTuple):
    """The checked arguments of a projection, in the order its custom ops take them."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    inv_temperature: torch.Tensor | None  # (N,)
    softcap: float | None
    logit_scale: float
    impl: str
    workspace_mb: float | None
    group: str  # name of the process group over which the vocabulary is split, or ""


def projection(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    impl: str | None,
    validate: bool | None,
    workspace_mb: float | None,
    process_group: "torch.distributed.ProcessGroup | None",
) -> Projection:
    """The arguments of `op`, checked, with the implementation that serves them."""
    weight = whole_weight(weight)
    _check_tensors(hidden, weight, targets, bias, temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    check_positive("logit_scale", logit_scale)
    host = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    if validate or (validate is None and host):
        # A shard's targets may lie in another one's part of the vocabulary.
        _check_values(targets, temperature, weight.shape[0] if process_group is None else None)
    impl = select_head(op, hidden, impl)
    if impl == "reference" and process_group is not None:
        raise InputError("process_group: impl 'reference' has no vocabulary shards")
    return Projection(
        hidden,
        weight,
        bias,
        targets.long(),
        inverse_temperature(temperature, hidden),
        softcap,
        float(logit_scale),
        impl,
        workspace_mb,
        "" if process_group is None else process_group.group_name,
    )


def _check_tensors(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("hidden", hidden, "N D", like=sizes, floating=True)
    here = {"like": sizes, "device": hidden.device}
    check_tensor("weight", weight, "V D", dtypes=(hidden.dtype,), **here)
    check_tensor("targets", targets, "N", dtypes=(torch.int64, torch.int32), **here)
    if bias is not None:
        check_tensor("bias", bias, "V", floating=True, **here)
    if isinstance(temperature, torch.Tensor):
        check_tensor("temperature", temperature, "N", like=sizes, floating=True)
    else:
        check_positive("temperature", temperature)


def _check_values(
    targets: torch.Tensor, temperature: float | torch.Tensor, vocabulary: int | None
) -> None:
    """Checks that read tensors; targets where all of the vocabulary is here."""
    if vocabulary is not None:
        check_targets(targets, vocabulary)
    if isinstance(temperature, torch.Tensor) and not bool((temperature > 0).all()):
        row = int((~(temperature > 0)).nonzero()[0, 0])
        raise InputError(
            f"temperature: row {row} is {float(temperature[row])}, expected a number > 0"
        )


def select_head(op: str, hidden: torch.Tensor, impl: str | None) -> str:
    """The implementation of a projection op: the kernels take float32 logits."""
    if hidden.dtype == torch.float64:
        if impl in ("cpp", "triton"):
            raise InputError(f"impl: {op} cannot run as {impl!r}: hidden is float64")
        impl = impl or "torch"
    return select(op, hidden.device, impl)


def inverse_temperature(
    temperature: float | torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor | None:
    """(N,) 1 / T in at least float32, or None for a temperature of 1."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(temperature, torch.Tensor):
        return 1.0 / temperature.detach().to(dtype)
    if temperature == 1.0:
        return None
    return hidden.new_full((hidden.shape[0],), 1.0 / temperature, dtype=dtype)


def whole_weight(weight: torch.Tensor) -> torch.Tensor:
    """A DTensor weight gathered (differentiably); InputError for a ZeRO-3 stub."""
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    if isinstance(weight, torch.Tensor) and weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise InputError(
            "weight: an empty ZeRO-3 shard; gather it (deepspeed.zero.GatheredParameters) or call "
            "the op inside the model's forward"
        )
    return weight
