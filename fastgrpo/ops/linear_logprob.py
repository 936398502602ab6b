"""linear_logprob: log-probabilities of targets without storing the (N, V) logits."""

from dataclasses import dataclass

import torch

from fastgrpo.reference import linear_logprob as reference
from fastgrpo.checks import check_choice, check_positive, check_targets, check_tensor
from fastgrpo.errors import InputError
from fastgrpo.ops._select import select


@dataclass(frozen=True)
class LinearLogprob:
    """logp (N,); entropy (N,) or None; plan: how the gradients are made (see linear_logprob)."""

    logp: torch.Tensor
    entropy: torch.Tensor | None
    plan: str


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    impl: str | None = None,
    validate: bool | None = None,
) -> LinearLogprob:
    """Log-probabilities of `targets` under softmax(hidden @ weight.T), the logits never stored."""
    for name in outputs:
        check_choice("outputs", name, ("logp", "entropy"))
    want_entropy = "entropy" in outputs
    weight = check_head(hidden, weight, targets, bias, temperature, softcap, logit_scale, validate)
    targets = targets.long()
    impl = select("linear_logprob", hidden.device, "reference" if impl is None else impl)
    logp, entropy = reference.linear_logprob(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, want_entropy
    )
    return LinearLogprob(logp, entropy, "autograd")


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    validate: bool | None,
) -> torch.Tensor:
    """Check the arguments of a projection; returns the weight as an ordinary (V, D) tensor."""
    weight = whole_weight(weight)
    sizes: dict[str, int] = {}
    check_tensor("hidden", hidden, "N D", like=sizes, floating=True)
    check_tensor("weight", weight, "V D", like=sizes, dtypes=(hidden.dtype,), device=hidden.device)
    check_tensor(
        "targets",
        targets,
        "N",
        like=sizes,
        dtypes=(torch.int64, torch.int32),
        device=hidden.device,
    )
    if bias is not None:
        check_tensor("bias", bias, "V", like=sizes, floating=True, device=hidden.device)
    if isinstance(temperature, torch.Tensor):
        check_tensor("temperature", temperature, "N", like=sizes, floating=True)
    else:
        check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    check_positive("logit_scale", logit_scale)
    host = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    if validate or (validate is None and host):
        check_targets(targets, sizes["V"])
        if isinstance(temperature, torch.Tensor) and not bool((temperature > 0).all()):
            row = int((~(temperature > 0)).nonzero()[0, 0])
            raise InputError(
                f"temperature: row {row} is {float(temperature[row])}, expected a number > 0"
            )
    return weight


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
