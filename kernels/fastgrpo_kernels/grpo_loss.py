# SPDX-License-Identifier: Apache-2.0
"""The GRPO loss of packed log-probs: loss, statistics and every token's gradient in one kernel.

A program takes a piece of a sequence (`grpo_pieces`). It reads what the tokens of the sequence
share, if they share anything; walks its own tokens for loss, slope and statistics; and the last
program of a sequence spreads the gradient of a shared ratio over it, the last of all finishes the
loss. The gradient is made in the forward pass, because the loss is a scalar; the backward pass
scales it, also by the denominator, which may be the number of unmasked tokens of the call and is
then known only at the end.

Sums are fp32 in a fixed order, without atomics but the tickets that tell who comes last: results
are bitwise reproducible and do not depend on where a sequence lies. Only the structure of the
objective is compiled in; every number is a run-time argument.

Letters: N tokens, B sequences. Formulas: the docstring of `fastgrpo.Objective`.
"""

from typing import Any

import torch
import triton

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.grpo_formulas import Numbers, numbers_of
from fastgrpo_kernels.grpo_kernel import (
    BLOCK,
    HEAD,
    NUM_WARPS,
    OPTIONS,
    TILE,
    WORDS,
    Denominators,
    Structure,
    grpo_gradient_kernel,
    grpo_loss_kernel,
)
from fastgrpo_kernels.grpo_pieces import programs
from fastgrpo_kernels.grpo_statistics import CELLS
from fastgrpo_kernels.launch import launch
from fastgrpo_kernels.token_kl import token_kl


@torch.library.custom_op("fastgrpo::grpo_loss_triton", mutates_args=())
def _grpo_loss(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    advantages: torch.Tensor,
    seq_ids: torch.Tensor,
    mask: torch.Tensor | None,
    acting: torch.Tensor | None,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
    num_sequences: torch.Tensor | None,
    num_rows: int,
    num_stats: int,
    numbers: list[float],
    denominators: list[float],
    words: str,
    flags: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dlogp (N,) before the denominator, statistics (num_stats, 2), working memory)."""
    N, rows = len(logp), max(num_rows, 1)
    slots = programs(N, rows, TILE)
    loss, dlogp, stats, work = _outputs(logp, num_rows, num_stats)
    streams = (logp, advantages, seq_ids, mask, acting, old_logp, ref_logp, rollout_logp, entropy)
    streams += (token_weights, scales)
    launch(
        grpo_loss_kernel,
        (slots,),
        logp,
        *(None if x is None else x.contiguous() for x in streams),
        num_tokens,
        num_sequences,
        loss,
        dlogp,
        stats,
        work,
        N,
        num_rows,
        slots,
        Numbers(*numbers),
        Denominators(*denominators),
        **Structure(*words.split("/"), *flags)._asdict(),
        TILE=TILE,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **OPTIONS,
    )
    return loss, dlogp, stats, work


@_grpo_loss.register_fake
def _(logp, *rest):
    return _outputs(logp, rest[12], rest[13])


def _outputs(logp: torch.Tensor, num_rows: int, num_stats: int) -> tuple[torch.Tensor, ...]:
    wide, rows = {"dtype": torch.float32}, max(num_rows, 1)
    work = HEAD.value + rows + CELLS * programs(logp.shape[0], rows, TILE)
    return (
        logp.new_empty(()),
        logp.new_empty(logp.shape, **wide),
        logp.new_empty(num_stats, 2, **wide),
        logp.new_zeros(work, **wide),
    )


@torch.library.custom_op("fastgrpo::grpo_gradient_triton", mutates_args=())
def _grpo_gradient(
    dloss: torch.Tensor, dlogp: torch.Tensor, work: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(N,) dloss dlogp / denominator in `dtype`."""
    out = dlogp.new_empty(dlogp.shape, dtype=dtype)
    N = len(dlogp)
    grid = (triton.cdiv(N, TILE),)
    launch(grpo_gradient_kernel, grid, dlogp, dloss, dlogp, work, out, N, BLOCK=TILE)
    return out


@_grpo_gradient.register_fake
def _(dloss, dlogp, work, dtype):
    return dlogp.new_empty(dlogp.shape, dtype=dtype)


def _save(ctx, inputs, output) -> None:
    logp, entropy, mask, acting = inputs[0], inputs[1], inputs[4], inputs[5]
    _, dlogp, stats, work = output
    ctx.save_for_backward(dlogp, work, mask if acting is None else acting)
    ctx.mark_non_differentiable(dlogp, stats, work)
    ctx.set_materialize_grads(False)
    ctx.dtypes = logp.dtype, None if entropy is None else entropy.dtype
    ctx.count = len(inputs)


def _backward(ctx, dloss: torch.Tensor | None, *_):
    grads = [None] * ctx.count
    if dloss is not None:
        dlogp, work, acting = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            grads[0] = _grpo_gradient(dloss, dlogp, work, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            each = (dloss * work[1]).expand(dlogp.shape)  # one number for every token that acts
            each = each if acting is None else torch.where(acting != 0, each, 0.0)
            grads[1] = each.to(ctx.dtypes[1])
    return tuple(grads)


_grpo_loss.register_autograd(_backward, setup_context=_save)


def _structure(t: Any, obj: Any, names: list[str], given: bool, by_row: bool) -> Structure:
    """given: the tokens' weights are; by_row: the advantages are (B,)."""
    beta = t.ref_logp is not None and obj.beta != 0.0
    correcting = t.rollout_logp is not None and obj.vllm_importance_sampling_correction
    level, _, how = (obj.vllm_importance_sampling_mode if correcting else "").partition("_")
    sequence = obj.importance_sampling_level == "sequence"
    divides = {"token-mean": "tokens", "token-sum": ""}.get(obj.aggregator, "sequences")
    return Structure(
        FORMULA=obj.loss.kernel,
        ESTIMATOR=(obj.kl_estimator if beta else "k1").removesuffix("+"),
        ROLLOUT_LEVEL=level,
        AGGREGATE="" if given else divides,
        CLIPS=obj.loss.clips,
        EXTRA=obj.loss.metric is not None,
        PLUS=beta and obj.kl_estimator.endswith("+"),
        BIAS_CORRECTION=beta and obj.use_bias_correction_kl,
        ROLLOUT_MASKED=how == "mask",
        OFF_POLICY_MASK=obj.off_policy_mask_threshold is not None,
        COUPLED=obj.couples_tokens(t.rollout_logp is not None),
        SEQUENCE_RATIO=sequence,
        PER_TOKEN=not by_row,
        ROW_MEAN=not given and obj.aggregator == "seq-mean-token-mean",
        BONUS=obj.entropy_coef != 0.0,
        METRICS=bool(names),
        FLAG_MEANS=sequence and t.per_sequence,
        EXTRA_MEANS=t.per_sequence and (sequence or obj.loss.metric_per_sequence),
    )


def _arguments(
    t: Any,
    obj: Any,
    num_rows: int,
    scales: Any,
    sampled_entropy_coef: float,
    names: list[str],
    num_tokens: float | torch.Tensor | None = None,
    num_sequences: float | torch.Tensor | None = None,
) -> tuple:
    """The arguments of `_grpo_loss`; those of `grpo_terms` described there."""
    given, per_sequence = scales is not None, 1.0
    structure = _structure(t, obj, names, given, by_row=t.per_sequence and not given)
    if given:
        num_tokens, num_sequences = scales.entropy, 0.0
    elif obj.aggregator == "seq-mean-token-sum-norm":
        per_sequence = 1.0 / obj.max_completion_length
    totals = (
        -1.0 if num_tokens is None else num_tokens,
        num_rows if num_sequences is None else num_sequences,
    )
    tensors = [x.to(t.logp.device) if isinstance(x, torch.Tensor) else None for x in totals]
    numbers = [float(x) if y is None else 0.0 for x, y in zip(totals, tensors, strict=True)]
    return (
        t.logp,
        t.entropy,
        t.advantages,
        t.seq_ids,
        t.mask,
        _high_entropy(t, obj),
        t.old_logp,
        t.ref_logp if obj.beta != 0.0 else None,
        t.rollout_logp,
        t.token_weights,
        scales.token if given else None,
        *tensors,
        num_rows,
        sum(not name.startswith("kl_terms/") for name in names),
        list(numbers_of(obj, sampled_entropy_coef)),
        [*numbers, per_sequence, float(obj.entropy_coef)],
        "/".join(structure[:WORDS]),
        list(structure[WORDS:]),
    )


def _high_entropy(t: Any, obj: Any) -> torch.Tensor | None:
    """The tokens at or above the entropy quantile of the call, or None without a quantile."""
    if obj.top_entropy_quantile >= 1.0:
        return None
    mask = torch.ones_like(t.seq_ids, dtype=torch.bool) if t.mask is None else t.mask.bool()
    entropy = t.entropy.detach().float()
    kept = torch.where(mask, entropy, torch.nan)
    if not len(kept):
        return mask
    return mask & (entropy >= kept.nanquantile(1.0 - obj.top_entropy_quantile))


def grpo_terms(
    t: Any,
    obj: Any,
    num_rows: int,
    scales: Any,
    kl_terms: Any,
    sampled_entropy_coef: float,
    num_tokens: float | torch.Tensor | None,
    num_sequences: float | torch.Tensor | None,
    names: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the tokens `t` and the (len(names), 2) statistics of its metrics.

    scales: the weight of each token, or None for what `obj.aggregator` makes of the denominators
    num_tokens and num_sequences (None: those of the call); advantages `t.per_sequence` are then
    (B,), else (N,). Other arguments as those of the reference's `loss_terms`; loss is
    differentiable in logp, entropy and the kl_terms' other_logp. Log-probs in float32 or lower
    precision; arithmetic in float32.
    """
    assert t.logp.dtype != torch.float64
    rest = (sampled_entropy_coef, names, num_tokens, num_sequences)
    loss, _, stats, _ = _grpo_loss(*_arguments(t, obj, num_rows, scales, *rest))
    if not kl_terms:
        return loss, stats
    parts, rows = [], []
    for term in kl_terms:
        kl = _stream_kl(t, term)
        parts.append(term.coefficient * (kl * scales.token).sum())
        rows.append(torch.stack([kl.detach().sum(), t.mask.sum()]))
    part = torch.stack(parts).sum()
    stats = torch.cat([stats, torch.stack(rows)])
    stats[0, 0] += part.detach()  # policy_loss
    return loss + part.to(loss.dtype), stats


def grpo_slopes(
    t: Any, obj: Any, num_rows: int, scales: Any, kl_terms: Any, sampled_entropy_coef: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dloss/dlogp, dloss/dentropy or None), both (N,) float32, without statistics or autograd."""
    args = _arguments(t, obj, num_rows, scales, sampled_entropy_coef, [])
    _, dlogp, _, work = _grpo_loss(*args)
    for term in kl_terms:
        slope = _stream_kl(t, term, slope=True)
        dlogp -= term.coefficient * slope * scales.token
    if obj.entropy_coef == 0.0:
        return dlogp, None
    acting = t.mask if args[5] is None else args[5]
    return dlogp, torch.where(acting, work[1], 0.0)


def _stream_kl(t: Any, term: Any, slope: bool = False) -> torch.Tensor:
    """(N,) a stream's KL, or its slope by other_logp - logp; 0 where its masks are not set."""
    logp, other = (torch.where(t.mask, x, 0.0) for x in (t.logp, term.other_logp))
    kl = token_kl(logp, other, term.estimator, term.log_ratio_clamp, term.value_clamp, slope)
    kept = t.mask if term.mask is None else t.mask & term.mask.bool()
    return torch.where(kept, kl, 0.0)


def aot_specs() -> list[KernelSpec]:
    floats = ("logp", "advantages", "loss", "dlogp", "stats", "work")
    signature = {f"{name}_ptr": "*fp32" for name in floats} | {"seq_ids_ptr": "*i64"}
    signature |= dict.fromkeys(("N", "B", "slots"), "i32")
    signature |= {"n": Numbers(*["fp32"] * len(Numbers._fields))}
    signature |= {"d": Denominators(*["fp32"] * len(Denominators._fields))}
    optional = dict.fromkeys(
        ("old_ptr", "ref_ptr", "rollout_ptr", "entropy_ptr", "token_weights_ptr", "scales_ptr")
        + ("num_tokens_ptr", "num_sequences_ptr"),
        "*fp32",
    ) | {"acting_ptr": "*i1", "mask_ptr": "*i1"}

    def spec(structure: Structure, *absent: str) -> KernelSpec:
        present = {name: kind for name, kind in optional.items() if name not in absent}
        level = "sequence" if structure.SEQUENCE_RATIO else "token"
        words = (structure.FORMULA, structure.ROLLOUT_LEVEL, level)
        label = " ".join(words if structure.METRICS else (*words, "slopes"))
        constexprs = structure._asdict() | {"TILE": TILE, "BLOCK": BLOCK}
        return KernelSpec(
            grpo_loss_kernel,
            signature | present,
            dict.fromkeys(absent) | constexprs,
            num_warps=NUM_WARPS,
            options=OPTIONS,
            label=label,
        )

    lean = tuple(name for name in optional if name not in ("old_ptr", "mask_ptr"))
    usual = Structure("clipped", "k3", "", "tokens", BIAS_CORRECTION=True)
    coupled = usual._replace(COUPLED=True, ROW_MEAN=True, AGGREGATE="sequences", BONUS=True)
    gspo = coupled._replace(SEQUENCE_RATIO=True, FLAG_MEANS=True)
    full = coupled._replace(ROLLOUT_LEVEL="token", OFF_POLICY_MASK=True, PER_TOKEN=True)
    formulas = ("cispo", "sapo", "vespo", "gmpo", "gspo_token", "dppo_tv", "dppo_kl", "dro")
    signature_of_gradient = dict.fromkeys(("dloss_ptr", "dlogp_ptr", "work_ptr"), "*fp32")
    return [
        spec(usual, *lean),
        spec(usual._replace(METRICS=False, AGGREGATE=""), *(set(lean) - {"scales_ptr"})),
        spec(gspo, *lean),
        spec(coupled._replace(ROLLOUT_LEVEL="sequence", ROLLOUT_MASKED=True)),
        spec(gspo._replace(ROLLOUT_LEVEL="geometric")),
        *(spec(full._replace(FORMULA=name)) for name in ("clipped", *formulas, "reinforce")),
        *(
            KernelSpec(
                grpo_gradient_kernel,
                signature_of_gradient | {"out_ptr": f"*{dtype}", "N": "i32"},
                {"BLOCK": TILE},
                label=dtype,
            )
            for dtype in ("fp32", "bf16")
        ),
    ]
