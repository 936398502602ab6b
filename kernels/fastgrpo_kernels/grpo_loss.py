"""The GRPO loss of packed log-probs: loss, metrics and every token's gradient in one kernel.

One program per sequence walks its tokens in blocks: once for the sums its tokens share (mean
log-ratio, rollout weight, drift), once for each token's loss and slope, and, where tokens are
coupled through a shared ratio, once more to spread the gradient of that ratio. The gradient is made
in the forward pass, because the loss is a scalar; the backward pass scales it.

Masked tokens are selected away before any arithmetic, so they may hold NaN or inf. NaN elsewhere
stays NaN. Sums are fp32 in a fixed order, without atomics: results are bitwise reproducible.
Only the structure of the objective is compiled in; every number is a run-time argument.

Letters: N tokens, B sequences; l log-prob, k log-ratio, r ratio, A advantage. Formulas: the
docstring of `fastgrpo.Objective`.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.grpo_formulas import (
    INF,
    LOG_1E8,
    Numbers,
    gmpo_k,
    number,
    numbers_of,
    policy,
    ratio,
    rollout_weight,
)
from fastgrpo_kernels.token_kl import clamp, kl_estimate, token_kl

# Two tokens per thread: the metrics' sums take most of the registers.
BLOCK, NUM_WARPS = 256, 4
# Left to itself ptxas spills a register to fit one more program on a multiprocessor.
OPTIONS = {"maxnreg": 128}
# Per sequence: what is added up over sequences, and what is maximised (minima negated).
SUMS = ("loss", "count", "kl", "entropy", "low", "high", "region", "extra", "gap", "known", "w")
MAXIMA = ("ratio", "-ratio", "-low", "high", "gap", "w", "-w")
NUM_SUMS, NUM_MAXIMA = tl.constexpr(len(SUMS)), tl.constexpr(len(MAXIMA))


@triton.jit
def _load(ptr, i, kept):
    return tl.load(ptr + i, mask=kept, other=0.0).to(tl.float32)


@triton.jit
def _flags(ptr, i, kept):
    return kept & (tl.load(ptr + i, mask=kept, other=0) != 0)


@triton.jit
def _streams(logp_ptr, old_ptr, rollout_ptr, i, kept):
    """logp, old and rollout log-probs, 0 where masked; an absent one equals the one before it."""
    logp = _load(logp_ptr, i, kept)
    old = logp
    if old_ptr is not None:
        old = _load(old_ptr, i, kept)
    rollout = old
    if rollout_ptr is not None:
        rollout = _load(rollout_ptr, i, kept)
    return logp, old, rollout


@triton.jit
def _shared(
    logp_ptr,
    advantages_ptr,
    mask_ptr,
    acting_ptr,
    old_ptr,
    rollout_ptr,
    start,
    end,
    n,
    FORMULA: tl.constexpr,
    ROLLOUT_LEVEL: tl.constexpr,
    ROLLOUT_MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over a sequence: tokens, k, rollout q, drift, A; GMPO's clipped k and their number;
    VESPO's log weight."""
    zero = tl.zeros((BLOCK,), tl.float32)
    length, k_sum, q_sum, drift, A_sum = zero, zero, zero, zero, zero
    clipped_sum, acting_sum, log_w = zero, zero, zero
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        kept = _flags(mask_ptr, i, i < end)
        logp, old, rollout = _streams(logp_ptr, old_ptr, rollout_ptr, i, kept)
        A = _load(advantages_ptr, i, kept)
        k, q = logp - old, number(old - rollout)
        length += kept.to(tl.float32)
        k_sum += k
        q_sum += q
        A_sum += A
        drift += number(rollout - logp)
        if FORMULA == "gmpo":
            acting = kept
            if acting_ptr is not None:
                acting = _flags(acting_ptr, i, kept)
            clipped_sum += tl.where(acting, gmpo_k(k, A, n)[0], 0.0)
            acting_sum += acting.to(tl.float32)
        if FORMULA == "vespo":
            log_w += clamp(k, -20.0, 20.0)
            if ROLLOUT_LEVEL == "token":
                w = rollout_weight(q, n, ROLLOUT_MASKED)
                log_w += tl.where(kept, clamp(tl.log(w), LOG_1E8, 20.0), 0.0)
    return (
        tl.sum(length, 0),
        tl.sum(k_sum, 0),
        tl.sum(q_sum, 0),
        tl.sum(drift, 0),
        tl.sum(A_sum, 0),
        tl.sum(clipped_sum, 0),
        tl.sum(acting_sum, 0),
        tl.sum(log_w, 0),
    )


@triton.jit
def _grpo_loss_kernel(
    logp_ptr,
    advantages_ptr,
    mask_ptr,
    acting_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    entropy_ptr,
    token_weights_ptr,
    scales_ptr,
    starts_ptr,
    dlogp_ptr,
    sums_ptr,
    maxima_ptr,
    n,
    FORMULA: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    PLUS: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    ROLLOUT_LEVEL: tl.constexpr,
    ROLLOUT_MASKED: tl.constexpr,
    OFF_POLICY_MASK: tl.constexpr,
    FLAG_MEANS: tl.constexpr,
    EXTRA_MEANS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    length, k_sum, q_sum, drift, A_sum, clipped_sum, acting_sum, log_w = _shared(
        logp_ptr,
        advantages_ptr,
        mask_ptr,
        acting_ptr,
        old_ptr,
        rollout_ptr,
        start,
        end,
        n,
        FORMULA,
        ROLLOUT_LEVEL,
        ROLLOUT_MASKED,
        BLOCK,
    )
    tokens, acting_tokens = tl.maximum(length, 1.0), tl.maximum(acting_sum, 1.0)
    shared_r, shared_slope = ratio(k_sum / tokens, n.ratio_limit)
    gspo_r, _ = ratio(clamp(k_sum / tokens, -INF, 10.0), n.ratio_limit)
    gmpo_r, gmpo_slope = ratio(clipped_sum / acting_tokens, n.ratio_limit)
    log_w, mean_A = clamp(log_w, LOG_1E8, 20.0), A_sum / tokens
    row_q = q_sum if ROLLOUT_LEVEL == "sequence" else q_sum / tokens
    row_w = rollout_weight(row_q, n, ROLLOUT_MASKED)

    zero = tl.zeros((BLOCK,), tl.float32)
    losses, kls, entropies, lows, highs, regions = zero, zero, zero, zero, zero, zero
    extras, gaps, known, ws, shared_slopes = zero, zero, zero, zero, zero
    r_max, r_min, gap_max, w_max, w_min = zero - INF, zero + INF, zero - INF, zero - INF, zero + INF
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        kept = _flags(mask_ptr, i, i < end)
        logp, old, rollout = _streams(logp_ptr, old_ptr, rollout_ptr, i, kept)
        A = _load(advantages_ptr, i, kept)
        k = logp - old
        r, slope = ratio(k, n.ratio_limit)
        if SEQUENCE_RATIO:
            r, slope = shared_r + zero, shared_slope + zero
        loss, by_l, by_ratio, by_mean, flag_low, flag_high, extra = policy(
            logp,
            k,
            old,
            A,
            r,
            slope,
            log_w,
            gspo_r,
            gmpo_r,
            gmpo_slope,
            mean_A,
            n,
            FORMULA,
        )

        weight = zero + 1.0
        if ROLLOUT_LEVEL == "token":
            w = rollout_weight(number(old - rollout), n, ROLLOUT_MASKED)
            ws += tl.where(kept, w, 0.0)
            w_max = tl.maximum(w_max, tl.where(kept, w, -INF))
            w_min = tl.minimum(w_min, tl.where(kept, w, INF))
            if FORMULA != "vespo":
                weight = w
        elif ROLLOUT_LEVEL != "":
            weight = row_w + zero
        if token_weights_ptr is not None:
            weight *= _load(token_weights_ptr, i, kept)
        acting = kept
        if OFF_POLICY_MASK:
            acting = kept & ((A >= 0) | (zero + drift / tokens <= n.drift_limit))
        if acting_ptr is not None and FORMULA != "gmpo":
            acting = _flags(acting_ptr, i, acting)
        loss = tl.where(acting, loss * weight, 0.0)
        by_l = tl.where(acting, by_l * weight, 0.0)
        by_ratio = tl.where(acting, by_ratio * weight, 0.0)
        by_mean = tl.where(acting, by_mean * weight, 0.0)

        if ref_ptr is not None:
            x = _load(ref_ptr, i, kept) - logp
            kl, by_x = kl_estimate(
                clamp(x, -n.ratio_limit, n.ratio_limit), n.kl_limit, ESTIMATOR, PLUS
            )
            by_x = tl.where(tl.abs(x) <= n.ratio_limit, by_x, 0.0)
            if BIAS_CORRECTION:
                by_ratio += n.beta * kl * slope
                kl, by_x = kl * r, by_x * r
            loss += n.beta * kl
            by_l -= n.beta * by_x
            kls += tl.where(kept, kl, 0.0)
        loss -= tl.where(n.entropy_pull != 0, n.entropy_pull * logp, 0.0)
        by_l -= n.entropy_pull

        scale = _load(scales_ptr, i, kept)
        losses += tl.where(kept, loss * scale, 0.0)
        if SEQUENCE_RATIO:
            shared_slopes += tl.where(kept, by_ratio * scale, 0.0)
        else:
            shared_slopes += tl.where(kept, by_mean * scale, 0.0)
            by_l += by_ratio
        tl.store(dlogp_ptr + i, tl.where(kept, by_l * scale, 0.0), mask=i < end)

        raw_r = tl.exp(k)
        r_max = tl.maximum(r_max, tl.where(kept, raw_r, -INF))
        r_min = tl.minimum(r_min, tl.where(kept, raw_r, INF))
        lows += (kept & flag_low).to(tl.float32)
        highs += (kept & flag_high).to(tl.float32)
        regions += (kept & (flag_low | flag_high)).to(tl.float32)
        extras += tl.where(kept, extra, 0.0)
        if entropy_ptr is not None:
            entropies += _load(entropy_ptr, i, kept)
        if ROLLOUT_LEVEL != "":
            gap = tl.abs(old - rollout)
            seen = kept & (gap == gap)
            gaps += tl.where(seen, gap, 0.0)
            known += seen.to(tl.float32)
            gap_max = tl.maximum(gap_max, tl.where(seen, gap, -INF))

    if SEQUENCE_RATIO or FORMULA == "gmpo":
        # What the sequence shares has a gradient through every token.
        total = tl.sum(shared_slopes, 0)
        tl.debug_barrier()  # the slopes stored above are read by other threads
        for first in range(start, end, BLOCK):
            i = first + tl.arange(0, BLOCK)
            kept = _flags(mask_ptr, i, i < end)
            part = zero + total / tokens
            if FORMULA == "gmpo":
                logp, old, rollout = _streams(logp_ptr, old_ptr, None, i, kept)
                A = _load(advantages_ptr, i, kept)
                part = zero + total / acting_tokens
                part = tl.where(gmpo_k(logp - old, A, n)[1], part, 0.0)
                if acting_ptr is not None:
                    part = tl.where(_flags(acting_ptr, i, kept), part, 0.0)
            gradient = tl.load(dlogp_ptr + i, mask=i < end, other=0.0)
            tl.store(dlogp_ptr + i, gradient + tl.where(kept, part, 0.0), mask=i < end)

    low, high, region = tl.sum(lows, 0), tl.sum(highs, 0), tl.sum(regions, 0)
    low_mean, high_mean = low / tokens, high / tokens
    if FLAG_MEANS:
        low, high, region = low_mean, high_mean, region / tokens
    extra = tl.sum(extras, 0)
    if EXTRA_MEANS:
        extra = extra / tokens
    row_w_sum, row_w_max, row_w_min = row_w, row_w, row_w
    if ROLLOUT_LEVEL == "token":
        row_w_sum, row_w_max, row_w_min = tl.sum(ws, 0), tl.max(w_max, 0), tl.min(w_min, 0)
    present = (length > 0) | FLAG_MEANS

    sums_ptr += row * NUM_SUMS
    tl.store(sums_ptr, tl.sum(losses, 0))
    tl.store(sums_ptr + 1, length)
    tl.store(sums_ptr + 2, tl.sum(kls, 0))
    tl.store(sums_ptr + 3, tl.sum(entropies, 0))
    tl.store(sums_ptr + 4, low)
    tl.store(sums_ptr + 5, high)
    tl.store(sums_ptr + 6, region)
    tl.store(sums_ptr + 7, extra)
    tl.store(sums_ptr + 8, tl.sum(gaps, 0))
    tl.store(sums_ptr + 9, tl.sum(known, 0))
    tl.store(sums_ptr + 10, row_w_sum)
    maxima_ptr += row * NUM_MAXIMA
    tl.store(maxima_ptr, tl.max(r_max, 0))
    tl.store(maxima_ptr + 1, -tl.min(r_min, 0))
    tl.store(maxima_ptr + 2, tl.where(present, -low_mean, -INF))
    tl.store(maxima_ptr + 3, tl.where(present, high_mean, -INF))
    tl.store(maxima_ptr + 4, tl.max(gap_max, 0))
    tl.store(maxima_ptr + 5, row_w_max)
    tl.store(maxima_ptr + 6, -row_w_min)


@torch.library.custom_op("fastgrpo::grpo_loss_triton", mutates_args=())
def _grpo_loss(
    logp: torch.Tensor,
    advantages: torch.Tensor,
    seq_ids: torch.Tensor,
    mask: torch.Tensor,
    scales: torch.Tensor,
    acting: torch.Tensor | None,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    num_rows: int,
    numbers: list[float],
    formula: str,
    sequence_ratio: bool,
    estimator: str,
    bias_correction: bool,
    rollout_mode: str,
    off_policy_mask: bool,
    flag_means: bool,
    extra_means: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dloss/dlogp (N,), SUMS (B, .), MAXIMA (B, .))."""
    dlogp, sums, maxima = _buffers(logp, num_rows)
    rows = torch.arange(num_rows + 1, device=logp.device)
    level, _, how = rollout_mode.partition("_")
    optional = (old_logp, ref_logp, rollout_logp, entropy, token_weights)
    if num_rows:
        _grpo_loss_kernel[(num_rows,)](
            logp.contiguous(),
            advantages.contiguous(),
            mask.contiguous(),
            None if acting is None else acting.contiguous(),
            *(None if x is None else x.contiguous() for x in optional),
            scales.contiguous(),
            torch.searchsorted(seq_ids.contiguous(), rows),
            dlogp,
            sums,
            maxima,
            Numbers(*numbers),
            FORMULA=formula,
            SEQUENCE_RATIO=sequence_ratio,
            ESTIMATOR=estimator.removesuffix("+"),
            PLUS=estimator.endswith("+"),
            BIAS_CORRECTION=bias_correction,
            ROLLOUT_LEVEL=level,
            ROLLOUT_MASKED=how == "mask",
            OFF_POLICY_MASK=off_policy_mask,
            FLAG_MEANS=flag_means,
            EXTRA_MEANS=extra_means,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            **OPTIONS,
        )
    loss = sums[:, 0].sum(dtype=torch.float64).to(logp.dtype)
    return loss, dlogp, sums, maxima


@_grpo_loss.register_fake
def _(logp, advantages, seq_ids, mask, scales, *rest):
    num_rows = rest[6]
    return logp.new_empty(()), *_buffers(logp, num_rows)


def _buffers(logp: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {"dtype": torch.float32, "device": logp.device}
    return (
        torch.empty(logp.shape, **options),
        torch.empty(num_rows, len(SUMS), **options),
        torch.empty(num_rows, len(MAXIMA), **options),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.count = inputs[0].dtype, len(inputs)


def _backward(ctx, dloss: torch.Tensor | None, *_):
    (dlogp,) = ctx.saved_tensors
    grad = None if dloss is None else (dloss.float() * dlogp).to(ctx.dtype)
    return grad, *(None,) * (ctx.count - 1)


_grpo_loss.register_autograd(_backward, setup_context=_save)


def grpo_terms(
    t: Any,
    obj: Any,
    num_rows: int,
    scales: Any,
    kl_terms: Any,
    sampled_entropy_coef: float,
    names: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the tokens `t` and the (len(names), 2) statistics of its metrics.

    Arguments as those of the reference's `loss_terms`; loss is differentiable in logp, entropy and
    the kl_terms' other_logp. Log-probs in float32 or lower precision; arithmetic in float32.
    """
    assert t.logp.dtype != torch.float64
    correcting = t.rollout_logp is not None and obj.vllm_importance_sampling_correction
    has_kl = t.ref_logp is not None and obj.beta != 0.0
    sequence_level = obj.importance_sampling_level == "sequence"
    acting = _high_entropy(t, obj)
    loss, _, sums, maxima = _grpo_loss(
        t.logp,
        t.advantages,
        t.seq_ids,
        t.mask,
        scales.token,
        acting,
        t.old_logp,
        t.ref_logp if has_kl else None,
        t.rollout_logp,
        None if t.entropy is None else t.entropy.detach(),
        t.token_weights,
        num_rows,
        list(numbers_of(obj, sampled_entropy_coef)),
        obj.loss.kernel,
        sequence_level,
        obj.kl_estimator if has_kl else "k1",
        obj.use_bias_correction_kl and has_kl,
        obj.vllm_importance_sampling_mode if correcting else "",
        obj.off_policy_mask_threshold is not None,
        sequence_level and t.per_sequence,
        t.per_sequence and (sequence_level or obj.loss.metric_per_sequence),
    )
    total, peak = sums.sum(0), maxima.amax(0) if num_rows else maxima.new_full((7,), -math.inf)
    count, rows = total[1], total.new_tensor(float(num_rows))
    kl_stats = []
    policy_loss = loss.detach()
    for term in kl_terms:
        kl = token_kl(
            torch.where(t.mask, t.logp, 0.0),
            torch.where(t.mask, term.other_logp, 0.0),
            term.estimator,
            term.log_ratio_clamp,
            term.value_clamp,
        )
        kl = kl if term.mask is None else torch.where(term.mask.bool(), kl, 0.0)
        part = term.coefficient * (torch.where(t.mask, kl, 0.0) * scales.token).sum()
        loss, policy_loss = loss + part, policy_loss + part.detach()
        kl_stats.append(kl.detach().sum())
    if obj.entropy_coef != 0.0:
        acting = t.mask if acting is None else acting
        entropy = torch.where(acting, t.entropy, 0.0).sum() / acting.sum().clamp(min=1)
        loss = loss - obj.entropy_coef * scales.entropy * entropy
    stats = _statistics(obj, t.per_sequence, total, peak, count, rows)
    stats["policy_loss"] = (policy_loss.float(), torch.zeros_like(count))
    stats |= {f"kl_terms/{i}": (kl.float(), count) for i, kl in enumerate(kl_stats)}
    flat = [x for name in names for x in stats[name]]
    return loss, torch.stack(flat).view(len(names), 2)


def _high_entropy(t: Any, obj: Any) -> torch.Tensor | None:
    """The tokens at or above the entropy quantile of the call, or None without a quantile."""
    if obj.top_entropy_quantile >= 1.0:
        return None
    entropy = t.entropy.detach().float()
    kept = torch.where(t.mask, entropy, math.nan)
    if not len(kept):
        return t.mask
    return t.mask & (entropy >= kept.nanquantile(1.0 - obj.top_entropy_quantile))


def _statistics(
    obj: Any,
    per_sequence: bool,
    total: torch.Tensor,
    peak: torch.Tensor,
    count: torch.Tensor,
    rows: torch.Tensor,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Metric name -> (sum, count) of a mean or (value, 0) of an extremum."""
    sums, top = dict(zip(SUMS, total, strict=True)), dict(zip(MAXIMA, peak, strict=True))
    none = torch.zeros_like(count)
    by_sequence = rows if per_sequence else count
    level = by_sequence if obj.importance_sampling_level == "sequence" else count
    token_weights = obj.vllm_importance_sampling_mode.startswith("token")
    return {
        "ratio/min": (-top["-ratio"], none),
        "ratio/max": (top["ratio"], none),
        "kl": (sums["kl"], count),
        "entropy": (sums["entropy"], count),
        "clip_ratio/low_mean": (sums["low"], level),
        "clip_ratio/high_mean": (sums["high"], level),
        "clip_ratio/region_mean": (sums["region"], level),
        "clip_ratio/low_min": (-top["-low"], none),
        "clip_ratio/high_max": (top["high"], none),
        obj.loss.metric: (sums["extra"], by_sequence if obj.loss.metric_per_sequence else level),
        "sampling/sampling_logp_difference/mean": (sums["gap"], sums["known"]),
        "sampling/sampling_logp_difference/max": (top["gap"], none),
        "sampling/importance_sampling_ratio/min": (-top["-w"], none),
        "sampling/importance_sampling_ratio/mean": (sums["w"], count if token_weights else rows),
        "sampling/importance_sampling_ratio/max": (top["w"], none),
    }


def aot_specs() -> list[KernelSpec]:
    fp32 = ("logp", "advantages", "scales", "dlogp", "sums", "maxima")
    signature = {f"{name}_ptr": "*fp32" for name in fp32}
    signature |= {"mask_ptr": "*i1", "starts_ptr": "*i64"}
    signature |= {"n": Numbers(*["fp32"] * len(Numbers._fields))}
    optional = dict.fromkeys(
        ("old_ptr", "ref_ptr", "rollout_ptr", "entropy_ptr", "token_weights_ptr"), "*fp32"
    ) | {"acting_ptr": "*i1"}

    def spec(formula: str, rollout: str, sequence: bool, *absent: str) -> KernelSpec:
        present = {name: kind for name, kind in optional.items() if name not in absent}
        level, _, how = rollout.partition("_")
        return KernelSpec(
            _grpo_loss_kernel,
            signature | present,
            dict.fromkeys(absent)
            | {
                "FORMULA": formula,
                "SEQUENCE_RATIO": sequence,
                "ESTIMATOR": "k3",
                "PLUS": False,
                "BIAS_CORRECTION": True,
                "ROLLOUT_LEVEL": level,
                "ROLLOUT_MASKED": how == "mask",
                "OFF_POLICY_MASK": not absent,
                "FLAG_MEANS": sequence,
                "EXTRA_MEANS": sequence,
                "BLOCK": BLOCK,
            },
            num_warps=NUM_WARPS,
            options=OPTIONS,
            label=" ".join((formula, rollout, "sequence" if sequence else "token")),
        )

    lean = ("ref_ptr", "rollout_ptr", "entropy_ptr", "token_weights_ptr", "acting_ptr")
    formulas = ("clipped", "cispo", "sapo", "vespo", "gmpo", "gspo_token", "dppo_tv", "dppo_kl")
    return [
        spec("clipped", "", False, *lean),
        spec("clipped", "", True, *lean),
        spec("clipped", "sequence_mask", False),
        spec("clipped", "geometric_truncate", True),
        *(spec(name, "token_truncate", False) for name in (*formulas, "dro", "reinforce")),
    ]
