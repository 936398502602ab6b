"""linear_grpo_loss: the GRPO loss with the projection fused in."""

from collections.abc import Sequence

import torch

from fastgrpo.errors import InputError
from fastgrpo.objective import KLTerm, Objective
from fastgrpo.ops._select import select
from fastgrpo.ops.grpo_loss import GRPOLoss, bool_mask, grpo_loss
from fastgrpo.ops.linear_logprob import check_head
from fastgrpo.reference.linear_logprob import IGNORE, linear_logprob


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
) -> GRPOLoss:
    """`grpo_loss` of the log-probs of softmax(hidden @ weight.T), the logits never stored."""
    temperature = obj.temperature if temperature is None else temperature
    weight = check_head(hidden, weight, targets, bias, temperature, softcap, logit_scale, validate)
    select("linear_grpo_loss", hidden.device, "reference" if impl is None else impl)
    for i, term in enumerate(kl_terms):
        if term.other_logp.requires_grad:
            raise InputError(f"kl_terms[{i}].other_logp: expected a constant; detach it")
    kept = bool_mask(mask, targets) & (targets != IGNORE)
    logp, entropy = linear_logprob(
        hidden,
        weight,
        torch.where(kept, targets, IGNORE),
        bias,
        temperature,
        softcap,
        logit_scale,
        with_entropy or obj.needs_entropy,
    )
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
