# SPDX-License-Identifier: Apache-2.0
"""The GRPO loss of the tokens of one piece: loss, slopes, and what the statistics add up.

Masked tokens are selected away before any arithmetic, so they may hold NaN or inf; NaN elsewhere
stays NaN. Letters: l log-prob, k log-ratio, r ratio, A advantage, q = old - rollout log-prob.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastgrpo_kernels.grpo_formulas import (
    INF,
    LOG_1E8,
    gmpo_k,
    number,
    policy,
    ratio,
    rollout_weight,
)
from fastgrpo_kernels.token_kl import clamp, kl_estimate


class Streams(NamedTuple):
    """Pointers to the (N,) inputs, None where absent; advantages (N,) or (B,)."""

    logp: tl.tensor
    advantages: tl.tensor
    mask: tl.tensor
    acting: tl.tensor
    old: tl.tensor
    ref: tl.tensor
    rollout: tl.tensor
    entropy: tl.tensor
    token_weights: tl.tensor
    scales: tl.tensor


class Token(NamedTuple):
    """A block of tokens; log-probs and advantage 0 where masked."""

    kept: tl.tensor
    logp: tl.tensor
    old: tl.tensor
    rollout: tl.tensor
    A: tl.tensor


class Shared(NamedTuple):
    """What the tokens of a sequence share: number, mean A, and by the objective a ratio with its
    slope, the drift of OPSM, VESPO's log weight, the rollout weight, the tokens that act."""

    tokens: tl.tensor
    mean_A: tl.tensor
    r: tl.tensor
    slope: tl.tensor
    drift: tl.tensor
    log_w: tl.tensor
    w: tl.tensor
    acting: tl.tensor


class Sums(NamedTuple):
    """Per lane: what a piece adds up and what it maximises (minima negated)."""

    loss: tl.tensor
    count: tl.tensor
    kl: tl.tensor
    entropy: tl.tensor
    low: tl.tensor
    high: tl.tensor
    region: tl.tensor
    extra: tl.tensor
    gap: tl.tensor
    known: tl.tensor
    w: tl.tensor
    spread: tl.tensor
    acting: tl.tensor
    acting_entropy: tl.tensor
    ratio_max: tl.tensor
    ratio_min: tl.tensor
    gap_max: tl.tensor
    w_max: tl.tensor
    w_min: tl.tensor


@triton.jit
def load(ptr, i, kept):
    return tl.load(ptr + i, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def flags(ptr, i, kept):
    """Where kept and the (N,) flags are set; an absent mask keeps all."""
    if ptr is None:
        return kept
    else:
        return kept & (tl.load(ptr + i, mask=kept, other=0) != 0)


@triton.jit
def token(s, row, i, inside, PER_TOKEN: tl.constexpr):
    """The tokens i; an absent stream of log-probs equals the one before it."""
    kept = flags(s.mask, i, inside)
    logp = load(s.logp, i, kept)
    old = logp
    if s.old is not None:
        old = load(s.old, i, kept)
    rollout = old
    if s.rollout is not None:
        rollout = load(s.rollout, i, kept)
    if PER_TOKEN:
        A = load(s.advantages, i, kept)
    else:
        A = load(s.advantages, row + i * 0, kept)
    return Token(kept, logp, old, rollout, A)


@triton.jit
def shared_by(
    s,
    piece,
    n,
    FORMULA: tl.constexpr,
    ROLLOUT_LEVEL: tl.constexpr,
    ROLLOUT_MASKED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    COUPLED: tl.constexpr,
    ROW_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Shared` of the piece's whole sequence: each of its pieces reads all of it."""
    zero = tl.zeros((BLOCK,), tl.float32)
    length, k_sum, q_sum, drift, A_sum = zero, zero, zero, zero, zero
    clipped, acting_count, log_w = zero, zero, zero
    if COUPLED or ROW_MEAN:
        for first in range(piece.row_start, piece.row_end, BLOCK):
            i = first + tl.arange(0, BLOCK)
            if COUPLED:
                t = token(s, piece.row, i, i < piece.row_end, PER_TOKEN)
                k, q = t.logp - t.old, number(t.old - t.rollout)
                length += t.kept.to(tl.float32)
                k_sum += k
                q_sum += q
                A_sum += t.A
                drift += number(t.rollout - t.logp)
                if FORMULA == "gmpo":
                    acting = flags(s.acting, i, t.kept)
                    clipped += tl.where(acting, gmpo_k(k, t.A, n)[0], 0.0)
                    acting_count += acting.to(tl.float32)
                if FORMULA == "vespo":
                    log_w += clamp(k, -20.0, 20.0)
                    if ROLLOUT_LEVEL == "token":
                        w = rollout_weight(q, n, ROLLOUT_MASKED)
                        log_w += tl.where(t.kept, clamp(tl.log(w), LOG_1E8, 20.0), 0.0)
            else:
                length += flags(s.mask, i, i < piece.row_end).to(tl.float32)
    tokens, acting = tl.maximum(tl.sum(length, 0), 1.0), tl.maximum(tl.sum(acting_count, 0), 1.0)
    mean_k = tl.sum(k_sum, 0) / tokens
    if FORMULA == "gspo_token":
        mean_k = clamp(mean_k, -INF, 10.0)
    if FORMULA == "gmpo":
        mean_k = tl.sum(clipped, 0) / acting
    r, slope = ratio(mean_k, n.ratio_limit)
    row_q = tl.sum(q_sum, 0)
    if ROLLOUT_LEVEL != "sequence":
        row_q = row_q / tokens
    return Shared(
        tokens,
        tl.sum(A_sum, 0) / tokens,
        r,
        slope,
        tl.sum(drift, 0) / tokens,
        clamp(tl.sum(log_w, 0), LOG_1E8, 20.0),
        rollout_weight(row_q, n, ROLLOUT_MASKED),
        acting,
    )


@triton.jit
def no_sums(BLOCK: tl.constexpr):
    o = tl.zeros((BLOCK,), tl.float32)
    low = o - INF
    return Sums(o, o, o, o, o, o, o, o, o, o, o, o, o, o, low, low, low, low, low)


class Terms(NamedTuple):
    """Of each token: the loss and its slopes by l, by the (level's) log-ratio and by GMPO's mean,
    and what is reported: KL, clip flags, the quantity of cispo and vespo, the rollout weight."""

    loss: tl.tensor
    by_l: tl.tensor
    by_ratio: tl.tensor
    by_mean: tl.tensor
    kl: tl.tensor
    flag_low: tl.tensor
    flag_high: tl.tensor
    extra: tl.tensor
    w: tl.tensor


@triton.jit
def terms_of(
    s,
    t,
    i,
    shared,
    n,
    FORMULA: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    PLUS: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    ROLLOUT_LEVEL: tl.constexpr,
    ROLLOUT_MASKED: tl.constexpr,
    OFF_POLICY_MASK: tl.constexpr,
):
    zero = tl.zeros_like(t.logp)
    k = t.logp - t.old
    r, slope = ratio(k, n.ratio_limit)
    if SEQUENCE_RATIO:
        r, slope = shared.r + zero, shared.slope + zero
    loss, by_l, by_ratio, by_mean, flag_low, flag_high, extra = policy(
        t.logp,
        k,
        t.old,
        t.A,
        r,
        slope,
        shared.log_w,
        shared.r,
        shared.r,
        shared.slope,
        shared.mean_A,
        n,
        FORMULA,
    )
    w, weight = zero, zero + 1.0
    if ROLLOUT_LEVEL == "token":
        w = rollout_weight(number(t.old - t.rollout), n, ROLLOUT_MASKED)
        if FORMULA != "vespo":
            weight = w
    elif ROLLOUT_LEVEL != "":
        weight = shared.w + zero
    if s.token_weights is not None:
        weight *= load(s.token_weights, i, t.kept)
    acting = t.kept
    if OFF_POLICY_MASK:
        acting = acting & ((t.A >= 0) | (shared.drift + zero <= n.drift_limit))
    if FORMULA != "gmpo":
        acting = flags(s.acting, i, acting)
    loss = tl.where(acting, loss * weight, 0.0)
    by_l = tl.where(acting, by_l * weight, 0.0)
    by_ratio = tl.where(acting, by_ratio * weight, 0.0)
    by_mean = tl.where(acting, by_mean * weight, 0.0)
    kl = zero
    if s.ref is not None:
        x = load(s.ref, i, t.kept) - t.logp
        limited = clamp(x, -n.ratio_limit, n.ratio_limit)
        kl, by_x = kl_estimate(limited, n.kl_limit, ESTIMATOR, PLUS)
        by_x = tl.where(tl.abs(x) <= n.ratio_limit, by_x, 0.0)
        if BIAS_CORRECTION:
            by_ratio += n.beta * kl * slope
            kl, by_x = kl * r, by_x * r
        loss += n.beta * kl
        by_l -= n.beta * by_x
    loss -= tl.where(n.entropy_pull != 0, n.entropy_pull * t.logp, 0.0)
    by_l -= n.entropy_pull
    return Terms(loss, by_l, by_ratio, by_mean, kl, flag_low, flag_high, extra, w)


@triton.jit
def _top(best, x, among):
    return tl.maximum(best, tl.where(among, x, -INF))


@triton.jit
def add(
    sums,
    s,
    t,
    i,
    terms,
    scale,
    spread,
    ROLLOUT_LEVEL: tl.constexpr,
    BONUS: tl.constexpr,
):
    """`sums` with one more block of tokens."""
    kept = t.kept
    entropy, acting = tl.zeros_like(t.logp), kept
    if s.entropy is not None:
        entropy = load(s.entropy, i, kept)
    if BONUS:
        acting = flags(s.acting, i, kept)
    gap = tl.abs(t.old - t.rollout)
    seen = kept & (gap == gap)
    w_max, w_min = sums.w_max, sums.w_min
    if ROLLOUT_LEVEL == "token":
        w_max, w_min = _top(w_max, terms.w, kept), _top(w_min, -terms.w, kept)
    r = tl.exp(t.logp - t.old)
    return Sums(
        sums.loss + tl.where(kept, terms.loss * scale, 0.0),
        sums.count + kept.to(tl.float32),
        sums.kl + tl.where(kept, terms.kl, 0.0),
        sums.entropy + entropy,
        sums.low + (kept & terms.flag_low).to(tl.float32),
        sums.high + (kept & terms.flag_high).to(tl.float32),
        sums.region + (kept & (terms.flag_low | terms.flag_high)).to(tl.float32),
        sums.extra + tl.where(kept, terms.extra, 0.0),
        sums.gap + tl.where(seen, gap, 0.0),
        sums.known + seen.to(tl.float32),
        sums.w + tl.where(kept, terms.w, 0.0),
        sums.spread + tl.where(kept, spread * scale, 0.0),
        sums.acting + acting.to(tl.float32),
        sums.acting_entropy + tl.where(acting, entropy, 0.0),
        _top(sums.ratio_max, r, kept),
        _top(sums.ratio_min, -r, kept),
        _top(sums.gap_max, gap, seen),
        w_max,
        w_min,
    )
