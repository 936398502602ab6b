# SPDX-License-Identifier: Apache-2.0
"""The GRPO policy losses and their slopes as device functions, one token per lane.

Letters: k log-ratio, r ratio, A advantage, q = old - rollout log-prob. Formulas: the docstring of
`fastgrpo.Objective`.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.token_kl import clamp, excess

INF = tl.constexpr(math.inf)
LOG_1E8 = tl.constexpr(math.log(1e-8))
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


class Numbers(NamedTuple):
    """The run-time numbers of an objective; an absent bound is an infinity."""

    epsilon: float
    epsilon_high: float
    delta: float
    dual_clip: float
    cispo_low: float
    cispo_high: float
    beta: float
    ratio_limit: float
    kl_limit: float
    rollout_low: float
    rollout_high: float
    drift_limit: float
    entropy_pull: float
    tau_pos: float
    tau_neg: float
    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float
    dro_beta: float


def numbers_of(obj: Any, sampled_entropy_coef: float) -> Numbers:
    """The numbers of a `fastgrpo.Objective`."""

    def or_else(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    low, high = obj.rollout_bounds
    absolute = obj.cispo_clip == "absolute"
    masked = obj.vllm_importance_sampling_mode.endswith("mask")
    return Numbers(
        epsilon=float(obj.epsilon),
        epsilon_high=float(obj.clip_high),
        delta=or_else(obj.delta, math.inf),
        dual_clip=or_else(obj.dual_clip, math.inf),
        cispo_low=-math.inf if absolute else 1.0 - obj.epsilon,
        cispo_high=obj.clip_high + (0.0 if absolute else 1.0),
        beta=float(obj.beta),
        ratio_limit=float(obj.log_ratio_clamp),
        kl_limit=or_else(obj.kl_value_clamp, math.inf),
        rollout_low=or_else(low, 0.0 if masked else -math.inf),
        rollout_high=or_else(high, math.inf),
        drift_limit=or_else(obj.off_policy_mask_threshold, math.inf),
        entropy_pull=float(sampled_entropy_coef),
        tau_pos=float(obj.sapo_temperature_pos),
        tau_neg=float(obj.sapo_temperature_neg),
        k_pos=float(obj.vespo_k_pos),
        lambda_pos=float(obj.vespo_lambda_pos),
        k_neg=float(obj.vespo_k_neg),
        lambda_neg=float(obj.vespo_lambda_neg),
        dro_beta=float(obj.dro_beta),
    )


@triton.jit
def ratio(k, limit):
    """e^k with k clamped to +-limit, and its slope: 0 beyond the clamp."""
    r = tl.exp(clamp(k, -limit, limit))
    return r, tl.where(tl.abs(k) <= limit, r, 0.0)


@triton.jit
def _bounded_min(x, dx, y, dy):
    """min(x, y) and its slope; a tie shares the gradient as PyTorch's does."""
    slope = tl.where(x < y, dx, tl.where(x == y, 0.5 * (dx + dy), dy))
    return tl.where(x < y, x, y), slope


@triton.jit
def _clipped(r, slope, A, n):
    """PPO's clipped loss of a ratio, its slope, and where it clips."""
    low, high = 1.0 - n.epsilon, 1.0 + n.epsilon_high
    bounded, d_bounded = tl.where(r > n.delta, n.delta, r), tl.where(r > n.delta, 0.0, slope)
    d_clip = tl.where((r >= low) & (r <= high), slope, 0.0)
    least, d_least = _bounded_min(bounded * A, d_bounded * A, clamp(r, low, high) * A, d_clip * A)
    loss, d = -least, -d_least
    lower, d_lower = _bounded_min(loss, d, -n.dual_clip * A, 0.0)
    down = (A < 0) & (n.dual_clip < INF)
    flag_low, flag_high = (bounded < low) & (A < 0), (bounded > high) & (A > 0)
    return tl.where(down, lower, loss), tl.where(down, d_lower, d), flag_low, flag_high


@triton.jit
def _dppo_outside(logp, old, A, n, FORMULA: tl.constexpr):
    """Whether the token's probability has moved further than the trust region allows."""
    p, p_old = tl.exp(logp), tl.exp(old)
    if FORMULA == "dppo_tv":
        return ((A > 0) & (p - p_old > n.epsilon_high)) | ((A < 0) & (p - p_old < -n.epsilon))
    else:
        rest = tl.maximum(-(excess(logp) + logp), TINY)  # 1 - p
        rest_old = tl.maximum(-(excess(old) + old), TINY)
        kl = p_old * (old - logp) + rest_old * (tl.log(rest_old) - tl.log(rest))
        up, down = (A > 0) & (p > p_old), (A < 0) & (p < p_old)
        return (up & (kl > n.epsilon_high)) | (down & (kl > n.epsilon))


@triton.jit
def _vespo_phi(log_w, A, n):
    power = tl.where(A >= 0, n.k_pos, n.k_neg)
    decay = tl.maximum(tl.where(A >= 0, n.lambda_pos, n.lambda_neg), 1e-4)
    phi = tl.exp(decay + power * log_w - decay * tl.exp(log_w))
    return tl.where(tl.abs(phi) < INF, phi, 0.0)


@triton.jit
def rollout_weight(q, n, MASKED: tl.constexpr):
    """Truncated (clip) or masked (0 outside the bounds) importance weight of e^q."""
    w = tl.exp(clamp(q, -80.0, 80.0))
    if MASKED:
        return tl.where((w >= n.rollout_low) & (w <= n.rollout_high), w, 0.0)
    else:
        return clamp(w, n.rollout_low, n.rollout_high)


@triton.jit
def number(x):
    """x with NaN as 0."""
    return tl.where(x == x, x, 0.0)


@triton.jit
def gmpo_k(k, A, n):
    """GMPO's one-sided clip of the log-ratio, and where it lets a gradient through."""
    up = A > 0
    inside = tl.where(up, k <= n.epsilon_high, k >= -n.epsilon)
    return tl.where(up, clamp(k, -INF, n.epsilon_high), clamp(k, -n.epsilon, INF)), inside


@triton.jit
def policy(
    logp, k, old, A, r, slope, log_w, gspo_r, gmpo_r, gmpo_slope, mean_A, n, FORMULA: tl.constexpr
):
    """Policy loss of each token; its slopes by logp, by the (level's) log-ratio and by GMPO's mean;
    clip flags, and the quantity cispo and vespo report."""
    zero = tl.zeros_like(logp)
    by_l, by_ratio, by_mean, extra = zero, zero, zero, zero
    flag_low, flag_high = logp < -INF, logp < -INF
    if FORMULA == "clipped":
        loss, by_ratio, flag_low, flag_high = _clipped(r, slope, A, n)
    elif FORMULA == "gspo_token":
        s = gspo_r + zero  # its value is the sequence's, its slope the token's own
        loss, by_l, flag_low, flag_high = _clipped(s, s, A, n)
    elif FORMULA == "gmpo":
        loss, by_mean = zero - mean_A * gmpo_r, zero - mean_A * gmpo_slope
        flag_low, flag_high = (k < -n.epsilon) & (A < 0), (k > n.epsilon_high) & (A > 0)
    elif FORMULA == "cispo":
        by_l = -clamp(r, n.cispo_low, n.cispo_high) * A
        loss = by_l * logp
        extra = ((r > n.cispo_high) & (A > 0)).to(tl.float32)
    elif FORMULA == "sapo":
        tau = tl.where(A > 0, n.tau_pos, n.tau_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (r - 1.0)))
        loss = -A * gate * 4.0 / tau
        by_ratio = -A * gate * (1.0 - gate) * 4.0 * slope
    elif FORMULA == "vespo":
        extra = _vespo_phi(log_w + zero, A, n)
        by_l = -extra * A
        loss = by_l * logp
    elif FORMULA == "dppo_tv" or FORMULA == "dppo_kl":
        outside = _dppo_outside(logp, old, A, n, FORMULA)
        flag_low, flag_high = outside & (A < 0), outside & (A > 0)
        by_l = tl.where(outside, 0.0, -A * clamp(r, -INF, 20.0))
        loss = tl.where(outside, 0.0, by_l * logp)
    elif FORMULA == "dro":
        by_l = n.dro_beta * k - A
        loss = 0.5 * n.dro_beta * k * k - logp * A
    else:
        by_l = -A
        loss = by_l * logp
    return loss, by_l, by_ratio, by_mean, flag_low, flag_high, extra
