"""The GRPO loss of packed log-probs in plain autograd PyTorch: the definition of every variant.

Letters: N tokens in a packed row, B sequences; l log-prob, k log-ratio, r ratio, A advantage.
Formulas and sources: `fastgrpo.objective.Objective`, passed in as `obj` (any object with its
fields; nothing is imported from it).
"""

import math
from typing import Any

import torch

from fastgrpo.losses.tokens import Scales, Tokens, segment_sum
from fastgrpo.reference.token_kl import token_kl

_ROLLOUT_CLAMP = 80.0  # exp(80) is finite in float32
_VESPO_LOW = math.log(1e-8)


def loss_terms(
    t: Tokens, obj: Any, num_rows: int, scales: Scales, kl_terms: Any, sampled_entropy_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the tokens `t`, differentiable in logp and entropy, and its metric terms.

    The sum over parts equals the whole if no part cuts a sequence whose tokens the objective
    couples (`obj.couples_tokens`), or the top-entropy quantile.
    """
    row = _Row(t, obj, num_rows)
    policy = policy_term(row)
    if row.weights is not None and obj.loss_type != "vespo":
        policy = policy * row.weights
    if t.token_weights is not None:
        policy = policy * row.select(t.token_weights)
    for keep in (row.on_policy, None if obj.loss_type == "gmpo" else row.high_entropy):
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


class _Row:
    """A packed row with masked tokens selected away, so that no arithmetic ever sees them."""

    def __init__(self, t: Tokens, obj: Any, num_rows: int) -> None:
        self.obj, self.num_rows, self.seq_ids, self.mask = obj, num_rows, t.seq_ids, t.mask
        self.metrics: dict[str, torch.Tensor] = {}
        self.logp = self.select(t.logp)
        self.old = self.logp.detach() if t.old_logp is None else self.select(t.old_logp.detach())
        self.ref = None if t.ref_logp is None else self.select(t.ref_logp)
        self.A = self.select(t.advantages.to(self.logp.dtype))
        self.lengths = segment_sum(t.mask.to(self.logp.dtype), t.seq_ids, num_rows)
        self.k = self.logp - self.old
        self.rollout = None if t.rollout_logp is None else self.select(t.rollout_logp)
        self.high_entropy = self._high_entropy(t.entropy)
        self.weights = self._rollout_weights()
        self.on_policy = self._on_policy()
        self.level_k = self.k
        if obj.importance_sampling_level == "sequence":
            self.level_k = self.sequence_mean(self.k)[t.seq_ids]
        self.ratio = self.exp(self.level_k)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """x where the mask is set, else exactly 0 (selected: 0 * inf would be NaN)."""
        return torch.where(self.mask, x, torch.zeros_like(x))

    def exp(self, k: torch.Tensor) -> torch.Tensor:
        """e^k with k clamped to +-log_ratio_clamp."""
        return k.clamp(-self.obj.log_ratio_clamp, self.obj.log_ratio_clamp).exp()

    def sequence_sum(self, x: torch.Tensor) -> torch.Tensor:
        return segment_sum(self.select(x), self.seq_ids, self.num_rows)

    def sequence_mean(self, x: torch.Tensor) -> torch.Tensor:
        return self.sequence_sum(x) / self.lengths.clamp(min=1.0)

    def _high_entropy(self, entropy: torch.Tensor | None) -> torch.Tensor | None:
        if self.obj.top_entropy_quantile >= 1.0:
            return None
        values = entropy.detach()[self.mask].float()
        if values.numel() == 0:
            return self.mask
        threshold = torch.quantile(values, 1.0 - self.obj.top_entropy_quantile)
        return self.mask & (entropy.detach() >= threshold)

    def _rollout_weights(self) -> torch.Tensor | None:
        """w(q) of the rollout correction, (N,); vespo takes its logarithm per token instead."""
        obj = self.obj
        if self.rollout is None or not obj.vllm_importance_sampling_correction:
            return None
        q = self.old.detach() - self.rollout
        q = self.select(q.where(~q.isnan(), torch.zeros_like(q)))
        level, how = obj.vllm_importance_sampling_mode.split("_")
        if level == "sequence":
            q = self.sequence_sum(q)
        elif level == "geometric":
            q = self.sequence_mean(q)
        w = q.clamp(-_ROLLOUT_CLAMP, _ROLLOUT_CLAMP).exp()
        low, high = obj.rollout_bounds
        if how == "truncate":
            if low is not None or high is not None:
                w = w.clamp(low, high)
        else:
            inside = (w >= (0.0 if low is None else low)) & (
                w <= (math.inf if high is None else high)
            )
            w = w.where(inside, torch.zeros_like(w))
        self.metrics["rollout_ratio"] = w
        self.metrics["rollout_difference"] = self.old.detach() - self.rollout
        return w if level == "token" else w[self.seq_ids]

    def _on_policy(self) -> torch.Tensor | None:
        """OPSM of DeepSeek-V3.2: which tokens' sequences stay."""
        threshold = self.obj.off_policy_mask_threshold
        if threshold is None:
            return None
        drift = (self.old if self.rollout is None else self.rollout) - self.logp.detach()
        drift = drift.where(~drift.isnan(), torch.zeros_like(drift))
        return (self.A >= 0) | (self.sequence_mean(drift) <= threshold)[self.seq_ids]


def policy_term(row: _Row) -> torch.Tensor:
    """(N,) the policy loss of each token before rollout weights, masks and KL."""
    obj, A, logp = row.obj, row.A, row.logp
    name = obj.loss_type
    if name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        return _clipped(row, row.ratio)
    if name == "gspo_token":
        s = row.sequence_mean(row.k).detach().clamp(max=10.0)[row.seq_ids]
        return _clipped(row, row.exp(s) * torch.exp(logp - logp.detach()))
    if name == "gmpo":
        return _gmpo(row)
    if name == "cispo":
        low = None if obj.cispo_clip == "absolute" else 1.0 - obj.epsilon
        high = obj.clip_high if obj.cispo_clip == "absolute" else 1.0 + obj.clip_high
        r = row.ratio.detach()
        row.metrics["cispo_clip"] = (r > high) & (A > 0)
        return -r.clamp(low, high) * A * logp
    if name == "sapo":
        tau = _by_sign(A > 0, A, obj.sapo_temperature_pos, obj.sapo_temperature_neg)
        return -A * torch.sigmoid(tau * (row.ratio - 1.0)) * 4.0 / tau
    if name == "vespo":
        return _vespo(row)
    if name in ("dppo_tv", "dppo_kl"):
        return _dppo(row)
    if name == "dro":
        return -(logp * A - 0.5 * obj.dro_beta * row.k**2)
    return -logp * A  # gpg, reinforce


def _by_sign(positive: torch.Tensor, like: torch.Tensor, yes: float, no: float) -> torch.Tensor:
    """yes where positive, else no, in the dtype of `like` (of two floats where() is float32)."""
    return torch.where(positive, torch.full_like(like, yes), torch.full_like(like, no))


def _clipped(row: _Row, ratio: torch.Tensor) -> torch.Tensor:
    obj, A = row.obj, row.A
    low, high = 1.0 - obj.epsilon, 1.0 + obj.clip_high
    bounded = ratio if obj.delta is None else ratio.clamp(max=obj.delta)
    loss = -torch.min(bounded * A, ratio.clamp(low, high) * A)
    if obj.dual_clip is not None:
        loss = torch.where(A < 0, torch.min(loss, -obj.dual_clip * A), loss)
    row.metrics["clip_low"] = (bounded.detach() < low) & (A < 0)
    row.metrics["clip_high"] = (bounded.detach() > high) & (A > 0)
    return loss


def _gmpo(row: _Row) -> torch.Tensor:
    obj, A, k = row.obj, row.A, row.k
    clipped = torch.where(A > 0, k.clamp(max=obj.clip_high), k.clamp(min=-obj.epsilon))
    acting = row.mask if row.high_entropy is None else row.high_entropy
    count = segment_sum(acting.to(k.dtype), row.seq_ids, row.num_rows).clamp(min=1.0)
    clipped = clipped.where(acting, torch.zeros_like(clipped))
    mean = segment_sum(clipped, row.seq_ids, row.num_rows) / count
    row.metrics["clip_low"] = (k.detach() < -obj.epsilon) & (A < 0)
    row.metrics["clip_high"] = (k.detach() > obj.clip_high) & (A > 0)
    return -(row.sequence_mean(A) * row.exp(mean))[row.seq_ids]


def _vespo(row: _Row) -> torch.Tensor:
    obj, A = row.obj, row.A
    log_w = row.sequence_sum(row.k.detach().clamp(-20.0, 20.0))
    if row.weights is not None:
        log_w = log_w + row.sequence_sum(row.weights.log().clamp(_VESPO_LOW, 20.0))
    log_w = log_w.clamp(_VESPO_LOW, 20.0)[row.seq_ids]
    k = _by_sign(A >= 0, A, obj.vespo_k_pos, obj.vespo_k_neg)
    lam = _by_sign(A >= 0, A, obj.vespo_lambda_pos, obj.vespo_lambda_neg).clamp(min=1e-4)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp()).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    row.metrics["phi"] = phi
    return -phi * A * row.logp


def _dppo(row: _Row) -> torch.Tensor:
    obj, A, logp, old = row.obj, row.A, row.logp.detach(), row.old
    p, p_old = logp.exp(), old.exp()
    if obj.loss_type == "dppo_tv":
        moved = p - p_old
        outside = ((A > 0) & (moved > obj.clip_high)) | ((A < 0) & (moved < -obj.epsilon))
    else:
        tiny = torch.finfo(p.dtype).tiny
        rest, rest_old = (-torch.expm1(logp)).clamp(min=tiny), (-torch.expm1(old)).clamp(min=tiny)
        kl = p_old * (old - logp) + rest_old * (rest_old.log() - rest.log())
        up, down = (A > 0) & (p > p_old), (A < 0) & (p < p_old)
        outside = (up & (kl > obj.clip_high)) | (down & (kl > obj.epsilon))
    row.metrics["clip_low"], row.metrics["clip_high"] = outside & (A < 0), outside & (A > 0)
    loss = -A * row.ratio.detach().clamp(max=20.0) * row.logp
    return loss.where(~outside, torch.zeros_like(loss))


def reference_kl(row: _Row) -> torch.Tensor:
    """(N,) the KL to the reference policy, times the ratio if use_bias_correction_kl."""
    obj = row.obj
    kl = token_kl(row.logp, row.ref, obj.kl_estimator, obj.log_ratio_clamp, obj.kl_value_clamp)
    return row.select(kl * row.ratio if obj.use_bias_correction_kl else kl)
