"""linear_logprob: log-probabilities of targets without storing the (N, V) logits."""

from dataclasses import dataclass

import torch

from fastgrpo.checks import check_choice, check_positive, check_targets, check_tensor
from fastgrpo.errors import InputError
from fastgrpo.ops._head import bfloat16_products, whole_weight
from fastgrpo.ops._linear_logprob import linear_logprob_op
from fastgrpo.ops._select import select
from fastgrpo.reference import linear_logprob as reference


@dataclass(frozen=True)
class LinearLogprob:
    """logp (N,); entropy (N,) or None; plan: how the gradients are made (see linear_logprob).

    overflow: rows whose exponents left float32 about the target logit, recomputed safely.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None
    plan: str
    overflow: torch.Tensor


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
    entropy_grad: bool = True,
    workspace_mb: float | None = None,
    process_group: object | None = None,
) -> LinearLogprob:
    """Log-probabilities of `targets` under softmax(hidden @ weight.T), the logits never stored.

        z      = hidden_n @ weight.T + bias
        f(z)   = softcap * tanh(logit_scale * z / softcap)      (logit_scale * z without a softcap)
        logp_n = log softmax(f(z) / temperature_n)[targets_n],   H_n = -sum_j p_nj log p_nj

    computed as -log1p(sum of exp about the target logit), so that a target whose probability is
    within 1e-7 of 1 keeps its log-prob and its gradient.

    Args:
        hidden: (N, D), weight: (V, D) of the same dtype; a DTensor weight is gathered. bias: (V,).
        targets: (N,) int64. -100: logp 0, no work, no gradient. Any other id outside [0, V):
            InputError naming the row on CPU or with validate=True; NaN in that row on CUDA.
        temperature: a number > 0, or (N,).
        outputs: "logp", and "entropy" if wanted; entropy_grad=False saves its backward work.
        impl: "reference", "torch", "cpp", "triton"; None picks the fastest there is.
        workspace_mb: memory for a chunk of logits (default 128, at least 512 rows; on a GPU 4096
            rows), and for keeping the exponentials (default 512).
        process_group: the weight and bias are this rank's vocabulary shard, in rank order; hidden
            and targets are the same on all ranks, and so is every result but dweight and dbias.

    Returns LinearLogprob: logp, entropy float32 (float64 from float64 inputs), differentiable in
    hidden, weight and bias. plan: "forward" (1 matmul: nothing needs a gradient), "frozen" (2: the
    weight needs none), "keep" (3: the (N, V) exponentials fit the workspace), "recompute" (4), or
    "autograd" (the reference). A row of hidden with NaN or inf makes only that row NaN. On the
    same machine the result is bitwise reproducible.
    """
    for name in outputs:
        check_choice("outputs", name, ("logp", "entropy"))
    want_entropy = "entropy" in outputs
    weight = check_head(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, validate, process_group
    )
    targets = targets.long()
    impl = select_head("linear_logprob", hidden, impl)
    if impl == "reference":
        if process_group is not None:
            raise InputError("process_group: impl 'reference' has no vocabulary shards")
        logp, entropy = reference.linear_logprob(
            hidden, weight, targets, bias, temperature, softcap, logit_scale, want_entropy
        )
        return LinearLogprob(logp, entropy, "autograd", targets.new_zeros(()))
    differentiable = want_entropy and entropy_grad
    plan = _plan(hidden, weight, bias, differentiable, workspace_mb)
    logp, entropy, _, _, overflow = linear_logprob_op(
        hidden,
        weight,
        targets,
        bias,
        inverse_temperature(temperature, hidden),
        softcap,
        float(logit_scale),
        want_entropy,
        plan,
        impl,
        workspace_mb,
        "" if process_group is None else process_group.group_name,
    )
    if want_entropy and not entropy_grad:
        entropy = entropy.detach()
    return LinearLogprob(logp, entropy if want_entropy else None, plan, overflow)


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


def _plan(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    entropy_grad: bool,
    workspace_mb: float | None,
) -> str:
    head_needs = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head_needs):
        return "forward"
    if not head_needs and not entropy_grad:
        return "frozen"
    itemsize = 2 if bfloat16_products(hidden) else max(4, hidden.dtype.itemsize)
    size = hidden.shape[0] * weight.shape[0] * itemsize
    return (
        "keep" if size <= (512.0 if workspace_mb is None else workspace_mb) * 2**20 else "recompute"
    )


def select_head(op: str, hidden: torch.Tensor, impl: str | None) -> str:
    """The implementation of a projection op: the kernels take float32 logits."""
    if hidden.dtype == torch.float64:
        if impl in ("cpp", "triton"):
            raise InputError(f"impl: {op} cannot run as {impl!r}: hidden is float64")
        impl = impl or "torch"
    return select(op, hidden.device, impl)


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    validate: bool | None,
    process_group: object | None = None,
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
        if process_group is None:
            check_targets(targets, sizes["V"])
        if isinstance(temperature, torch.Tensor) and not bool((temperature > 0).all()):
            row = int((~(temperature > 0)).nonzero()[0, 0])
            raise InputError(
                f"temperature: row {row} is {float(temperature[row])}, expected a number > 0"
            )
    return weight
