"""linear_grpo_loss: the GRPO loss with the projection fused in."""

from collections.abc import Sequence

import torch

from fastgrpo.checks import check_tensor
from fastgrpo.errors import InputError
from fastgrpo.losses.metrics import metric_names
from fastgrpo.losses.tokens import IGNORE
from fastgrpo.objective import KLTerm, Objective
from fastgrpo.ops.grpo_loss import (
    GRPOLoss,
    bool_mask,
    check_loss_extras,
    check_loss_inputs,
    grpo_loss,
    resolve_advantages,
)
from fastgrpo.ops.linear.inputs import check_head, inverse_temperature, select_head
from fastgrpo.ops.linear.one_pass import encode_spec, linear_grpo_op, run, scaled
from fastgrpo.reference.linear_logprob import linear_logprob


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    obj: Objective,
    *,
    seq_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    num_tokens: float | torch.Tensor | None = None,
    num_sequences: float | torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    kl_terms: Sequence[KLTerm] = (),
    sampled_entropy_coef: float = 0.0,
    with_entropy: bool = False,
    impl: str | None = None,
    validate: bool | None = None,
    workspace_mb: float | None = None,
    dweight_into: torch.Tensor | None = None,
    dweight_scale: float = 1.0,
    process_group: object | None = None,
) -> GRPOLoss:
    """`grpo_loss` of the log-probs of softmax(hidden @ weight.T), the logits never stored.

        linear_logprob -> grpo_loss, with dhidden and dweight made in the same pass over the logits

    Three matmuls (logits, dhidden, dweight); two when the weight needs no gradient; one under
    no_grad. Sequences longer than a chunk and top_entropy_quantile cost one more.

    Args:
        hidden, weight, targets, bias, softcap, logit_scale, process_group: see `linear_logprob`.
            A row whose target is -100 counts as masked. advantages, obj, seq_ids, mask and the
            rest: see `grpo_loss`. Masked rows are not projected.
        temperature: (N,) instead of obj.temperature.
        with_entropy: measure the entropy although the objective does not need it.
        workspace_mb: memory for a chunk of logits (default 128, at least 512 rows; on a GPU 4096
            rows).
        dweight_into: float32 (V, D): dweight * dweight_scale is added to it during this call (set
            dweight_scale to what the loss will be multiplied by before backward), and backward
            leaves weight.grad alone. Eager only.

    Returns GRPOLoss: loss is differentiable in hidden, weight and bias (once); logp (N,) is
    detached, 0 where masked; plan is "one_pass", "two_pass" (top_entropy_quantile), "forward" (no
    gradient wanted) or "autograd" (the reference); overflow counts the rows whose exponents left
    float32 about the target logit and were recomputed about their maximum.
    """
    temperature = obj.temperature if temperature is None else temperature
    weight = check_head(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, validate, process_group
    )
    impl = select_head("linear_grpo_loss", hidden, impl)
    _check_extras(obj, kl_terms, weight, dweight_into, process_group, impl)
    kept = bool_mask(mask, targets) & (targets != IGNORE)
    measure = with_entropy or obj.needs_entropy
    if impl == "reference":
        ids = torch.where(kept, targets.long(), IGNORE)
        head = (bias, temperature, softcap, logit_scale)
        logp, entropy = linear_logprob(hidden, weight, ids, *head, measure)
        return grpo_loss(
            logp,
            advantages,
            obj,
            seq_ids=seq_ids,
            mask=kept,
            old_logp=old_logp,
            ref_logp=ref_logp,
            rollout_logp=rollout_logp,
            entropy=entropy,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            token_weights=token_weights,
            kl_terms=kl_terms,
            sampled_entropy_coef=sampled_entropy_coef,
        )
    like = hidden.new_empty(hidden.shape[0])
    check_loss_inputs(like, advantages, obj, seq_ids, mask, old_logp, ref_logp, rollout_logp)
    check_loss_extras(like, obj, like, token_weights, kl_terms)
    per_token, num_rows, per_sequence = resolve_advantages(advantages, seq_ids)
    need = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden, weight, bias)
    ]
    args = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "targets": targets.long(),
        "inv_temperature": inverse_temperature(temperature, hidden),
        "advantages": per_token,
        "seq_ids": seq_ids,
        "mask": kept,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "rollout_logp": rollout_logp,
        "token_weights": token_weights,
        "kl_logps": [term.other_logp for term in kl_terms],
        "kl_masks": [_mask_tensor(term, hidden) for term in kl_terms],
        "num_tokens": _scalar(num_tokens, hidden),
        "num_sequences": _scalar(num_sequences, hidden),
        "num_rows": num_rows,
        "per_sequence": per_sequence,
        "spec": encode_spec(obj, kl_terms, sampled_entropy_coef),
        "softcap": softcap,
        "logit_scale": float(logit_scale),
        "entropy": measure,
        "need": need,
        "impl": impl,
        "workspace_mb": workspace_mb,
        "group": "" if process_group is None else process_group.group_name,
    }
    if dweight_into is None:
        loss, stats, logp, _, _, _, overflow = linear_grpo_op(**args)
    else:
        apply = _Accumulating.apply
        loss, stats, logp, overflow = apply(hidden, bias, args, dweight_into, dweight_scale)
    names = metric_names(
        obj, ref_logp is not None, rollout_logp is not None, measure, len(kl_terms)
    )
    plan = "two_pass" if obj.top_entropy_quantile < 1.0 else "one_pass"
    return GRPOLoss(loss, logp, stats, tuple(names), plan if any(need) else "forward", overflow)


class _Accumulating(torch.autograd.Function):
    """The op with dweight added to a tensor of the caller, and no gradient for the weight."""

    @staticmethod
    def forward(ctx, hidden, bias, args, into, into_scale):
        constants = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        out = run(**constants, into=into, into_scale=into_scale)
        ctx.save_for_backward(out[3], out[5])
        ctx.dtypes = hidden.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(out[1], out[2], out[6])
        return *out[:3], out[6]

    @staticmethod
    def backward(ctx, dloss, *_):
        dhidden, dbias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            scaled(dhidden, dloss, ctx.dtypes[0]) if needed[0] else None,
            scaled(dbias, dloss, ctx.dtypes[1]) if needed[1] else None,
            None,
            None,
            None,
        )


def _check_extras(obj, kl_terms, weight, dweight_into, process_group, impl) -> None:
    for i, term in enumerate(kl_terms):
        if term.other_logp.requires_grad:
            raise InputError(f"kl_terms[{i}].other_logp: expected a constant; detach it")
    if impl == "reference":
        for name, x in (("process_group", process_group), ("dweight_into", dweight_into)):
            if x is not None:
                raise InputError(f"{name}: impl 'reference' does not take it")
    if dweight_into is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        V, D = weight.shape
        check_tensor("dweight_into", dweight_into, f"{V} {D}", dtypes=(wide,), device=weight.device)
        if not weight.requires_grad:
            raise InputError("dweight_into: weight.requires_grad is False, expected None")


def _mask_tensor(term: KLTerm, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0, dtype=torch.bool) if term.mask is None else term.mask


def _scalar(value: float | torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    if value is None or isinstance(value, torch.Tensor):
        return value
    return torch.tensor(float(value), device=like.device)
