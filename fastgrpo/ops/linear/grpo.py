# SPDX-License-Identifier: Apache-2.0
"""linear_grpo_loss: the GRPO loss with the projection fused in."""

import dataclasses
from collections.abc import Sequence

import torch

from fastgrpo.checks import check_tensor
from fastgrpo.errors import InputError
from fastgrpo.losses.tokens import IGNORE, Tokens
from fastgrpo.objective import KLTerm, Objective
from fastgrpo.ops.grpo_loss import GRPOLoss, LossCall, checked
from fastgrpo.ops.linear.head import bfloat16_products
from fastgrpo.ops.linear.inputs import Projection, projection
from fastgrpo.ops.linear.logprob import linear_logprob_op
from fastgrpo.ops.linear.memory import keeps
from fastgrpo.ops.linear.one_pass import linear_grpo_op, pack, run, scaled
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
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> GRPOLoss:
    """`grpo_loss` of the log-probs of softmax(hidden @ weight.T), the logits never stored.

        linear_logprob -> grpo_loss, with dhidden and dweight made in the same pass over the logits

    Three matmuls (logits, dhidden, dweight); two when the weight needs no gradient; one under
    no_grad. Sequences longer than a chunk and top_entropy_quantile cost one more, unless the
    exponentials are kept.

    Args:
        hidden, weight, targets, bias, softcap, logit_scale, process_group: see `linear_logprob`.
            A row whose target is -100 counts as masked. advantages, obj, seq_ids, mask and the
            rest: see `grpo_loss`. Masked rows are not projected.
        temperature: (N,) instead of obj.temperature.
        with_entropy: measure the entropy although the objective does not need it.
        workspace_mb: memory for a chunk of logits (default 128, at least 512 rows; on a GPU 4096
            rows, fewer where memory is short). If it holds the (N, V) exponentials, by default on a
            GPU if a sixteenth of its memory does and is free, they are kept and backward makes the
            gradients of a trained head from them, each in one matmul.
        dweight_into: float32 (V, D): dweight * dweight_scale is added to it during this call (set
            dweight_scale to what the loss will be multiplied by before backward), and backward
            leaves weight.grad alone. Eager only.

    Returns GRPOLoss: loss is differentiable in hidden, weight and bias (once); logp and entropy
    (None unless measured) are (N,), detached, 0 where masked; plan is "one_pass", "two_pass"
    (top_entropy_quantile), "keep" (the exponentials are), "forward" (no gradient wanted) or
    "autograd" (the reference); overflow counts the rows whose exponents left float32 about the
    target logit and were recomputed about their maximum.
    """
    if not isinstance(obj, Objective):
        raise InputError(f"obj: expected fastgrpo.Objective, got {type(obj).__name__}")
    temperature = obj.temperature if temperature is None else temperature
    head = projection(
        *("linear_grpo_loss", hidden, weight, targets, bias, temperature, softcap, logit_scale),
        *(impl, validate, workspace_mb, process_group),
    )
    _check_extras(head, kl_terms, dweight_into)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    to_come = hidden.new_empty(hidden.shape[0], dtype=wide)
    entropy = to_come if with_entropy or obj.needs_entropy else None
    given = (advantages, seq_ids, mask, old_logp, ref_logp, rollout_logp, entropy, token_weights)
    totals = (num_tokens, num_sequences, kl_terms, sampled_entropy_coef)
    call = checked(Tokens(to_come, *given), obj, *totals, targets)
    if head.impl == "reference":
        return _by_reference(head, call.per_token(), temperature)
    if dweight_into is None and _keeps(head):
        return _by_log_probs(head, call)
    return _by_chunks(head, call.per_token(), dweight_into, dweight_scale)


def _by_reference(head: Projection, call: LossCall, temperature: float | torch.Tensor) -> GRPOLoss:
    t = call.tokens
    ids = torch.where(t.mask, head.targets, IGNORE)
    options = (head.bias, temperature, head.softcap, head.logit_scale, t.entropy is not None)
    logp, entropy = linear_logprob(head.hidden, head.weight, ids, *options)
    return call._replace(tokens=t._replace(logp=logp, entropy=entropy)).evaluate("reference")


def _keeps(head: Projection) -> bool:
    """Whether all exponentials are kept and both gradients made from them in backward.

    It pays where the head is trained: a gradient of the weight in one matmul, in its own dtype. On
    the CPU, where each chunk is used while it is in the cache, only if `workspace_mb` asks for it.
    """
    weight, hidden = head.weight, head.hidden
    if not (torch.is_grad_enabled() and weight.requires_grad) or head.group:
        return False
    if head.workspace_mb is None and hidden.device.type == "cpu":
        return False
    itemsize = 2 if bfloat16_products(hidden) else max(4, hidden.dtype.itemsize)
    sizes = (hidden.shape[0], weight.shape[0], itemsize)
    return keeps(*sizes, head.workspace_mb, hidden.device)


def _by_log_probs(head: Projection, call: LossCall) -> GRPOLoss:
    """The loss of the log-probs of plan "keep"; any coupling of tokens takes three matmuls."""
    t = call.tokens
    targets = head.targets if t.mask is None else torch.where(t.mask, head.targets, IGNORE)
    head = head._replace(targets=targets)
    logp, entropy, _, _, overflow = linear_logprob_op(*head, t.entropy is not None, "keep")
    if t.entropy is not None:
        bonus = call.obj.entropy_coef != 0.0
        t = t._replace(entropy=entropy if bonus else entropy.detach())
    call = call._replace(tokens=t._replace(logp=logp))
    fused = head.impl == "triton" and call.obj.loss.kernel is not None
    if not fused or call.kl_terms:
        call = call.per_token()
    result = call.evaluate("triton" if fused else "reference")
    return dataclasses.replace(result, plan="keep", overflow=overflow)


def _by_chunks(
    head: Projection, call: LossCall, into: torch.Tensor | None, into_scale: float
) -> GRPOLoss:
    inputs = (head.hidden, head.weight, head.bias)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if into is None:
        columns, spec = pack(call)
        loss, stats, logp, _, _, _, overflow, entropy = linear_grpo_op(
            *head, columns, call.num_rows, spec, need
        )
    else:
        apply = _Accumulating.apply
        loss, stats, logp, overflow, entropy = apply(
            head.hidden, head.bias, head, call, need, into, into_scale
        )
    plan = "two_pass" if call.obj.top_entropy_quantile < 1.0 else "one_pass"
    plan = plan if any(need) else "forward"
    entropy = None if call.tokens.entropy is None else entropy
    return GRPOLoss(loss, logp, stats, tuple(call.names), plan, overflow, entropy)


class _Accumulating(torch.autograd.Function):
    """The op with dweight added to a tensor of the caller, and no gradient for the weight."""

    @staticmethod
    def forward(ctx, hidden, bias, head, call, need, into, into_scale):
        out = run(head, call, need, into, into_scale)
        loss, stats, logp, dhidden, _, dbias, overflow, entropy = out
        ctx.save_for_backward(dhidden, dbias)
        ctx.dtypes = hidden.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(stats, logp, overflow, entropy)
        return loss, stats, logp, overflow, entropy

    @staticmethod
    def backward(ctx, dloss, *_):
        grads = [
            scaled(grad, dloss, dtype) if needed else None
            for grad, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        ]
        return *grads, None, None, None, None, None


def _check_extras(
    head: Projection, kl_terms: Sequence[KLTerm], dweight_into: torch.Tensor | None
) -> None:
    for i, term in enumerate(kl_terms):
        if term.other_logp.requires_grad:
            raise InputError(f"kl_terms[{i}].other_logp: expected a constant; detach it")
    if dweight_into is not None:
        weight = head.weight
        if head.impl == "reference":
            raise InputError("dweight_into: impl 'reference' does not take it")
        wide = torch.promote_types(weight.dtype, torch.float32)
        V, D = weight.shape
        check_tensor("dweight_into", dweight_into, f"{V} {D}", dtypes=(wide,), device=weight.device)
        if not weight.requires_grad:
            raise InputError("dweight_into: weight.requires_grad is False, expected None")
