# SPDX-License-Identifier: Apache-2.0
"""The GRPO loss of packed log-probs in plain autograd PyTorch: the definition of every variant.

Letters: N tokens in a packed row, B sequences. The policy term of a token is the formula of the
objective's loss type (`fastgrpo.losses.types`); `obj` is any object with the fields of
`fastgrpo.objective.Objective`, nothing is imported from it.
"""

from typing import Any

import torch

from fastgrpo.losses.row import Row
from fastgrpo.losses.tokens import Scales, Tokens
from fastgrpo.reference.token_kl import token_kl


def loss_terms(
    t: Tokens, obj: Any, num_rows: int, scales: Scales, kl_terms: Any, sampled_entropy_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the tokens `t`, differentiable in logp and entropy, and its metric terms.

    The sum over parts equals the whole if no part cuts a sequence whose tokens the objective
    couples (`obj.couples_tokens`), or the top-entropy quantile.
    """
    row = Row(t, obj, num_rows)
    loss_type = obj.loss
    policy = loss_type.formula(row)
    if row.weights is not None and not loss_type.folds_rollout_weights:
        policy = policy * row.weights
    if t.token_weights is not None:
        policy = policy * row.select(t.token_weights)
    for keep in (row.on_policy, None if loss_type.folds_entropy_mask else row.high_entropy):
        if keep is not None:
            policy = policy.where(keep, torch.zeros_like(policy))
    token_loss = policy
    if t.ref_logp is not None and obj.beta != 0.0:
        row.metrics["kl"] = kl = reference_kl(row)
        token_loss = token_loss + obj.beta * kl
    for i, term in enumerate(kl_terms):
        other = row.select(term.other_logp)
        kl = token_kl(row.logp, other, term.estimator, term.log_ratio_clamp, term.value_clamp)
        if term.mask is not None:
            kl = kl.where(term.mask.bool(), torch.zeros_like(kl))
        row.metrics[f"kl_terms/{i}"] = kl
        token_loss = token_loss + term.coefficient * kl
    if sampled_entropy_coef != 0.0:
        token_loss = token_loss - sampled_entropy_coef * row.logp
    loss = (row.select(token_loss) * scales.token).sum()
    row.metrics["policy_loss"] = loss.detach()
    if obj.entropy_coef != 0.0:
        acting = row.mask if row.high_entropy is None else row.high_entropy
        total = t.entropy.where(acting, torch.zeros_like(t.entropy)).sum()
        mean = total / acting.sum().clamp(min=1).to(total.dtype)
        loss = loss - obj.entropy_coef * scales.entropy * mean
    return loss, row.metrics


def reference_kl(row: Row) -> torch.Tensor:
    """(N,) the KL to the reference policy, times the ratio if use_bias_correction_kl."""
    obj = row.obj
    kl = token_kl(row.logp, row.ref, obj.kl_estimator, obj.log_ratio_clamp, obj.kl_value_clamp)
    return row.select(kl * row.ratio if obj.use_bias_correction_kl else kl)
