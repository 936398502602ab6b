# SPDX-License-Identifier: Apache-2.0
"""The streaming pass of the one-pass loss: logits in, exponentials about the target logit out.

Letters: C rows of a chunk, V vocabulary.
"""

import torch
from fastgrpo_kernels.exponentials import MAX_EXPONENT, OffsetExp

# Elements of a block that stays in the L2 cache between the in-place passes.
_BLOCK = 1 << 18


def offset_exp(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    inv_temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    exp_dtype: torch.dtype | None = None,
    target_logit: torch.Tensor | None = None,
) -> OffsetExp:
    """Replace a chunk of logits by exponentials about each row's target logit, in one sweep.

        f(z) = softcap * tanh(logit_scale * (z + bias) / softcap)     (no tanh without a softcap)
        d_j  = (f(z_j) - f(z_y)) * inv_temperature
        E_j  = exp(d_j) for j != y,   S = sum_{j != y} E_j,   E_y := -S

    so that logp_y = -log1p(S), keeping full relative precision when S -> 0, and
    d logp_y / d z_j = -E_j / ((1 + S) T) for every j, the target included. The entropy is
    log1p(S) - moment / (1 + S). No maximum is needed: a row whose exponents pass MAX_EXPONENT is
    only flagged.

    Args:
        logits: (C, V) float32 or float64, last dimension contiguous; overwritten.
        targets: (C,) int64 in [0, V); a row with another becomes NaN and is flagged.
        inv_temperature: (C,) of the logits' dtype, 1 / T; None means 1.
        bias: (V,) or None. logit_scale, softcap: floats.
        entropy: compute `moment`.
        exp_dtype: the dtype E is stored in, in place: the logits' own (None) or bfloat16, then as
            `logits.view(torch.bfloat16)[:, :V]`; S and moment are summed before the rounding.
        target_logit: (C,) f(z_y) where the vocabulary is sharded. A target outside [0, V) then
            lies on another shard and every column here counts into S. S and moment add up over
            the shards; the shard that holds the target has to replace E_y by minus the total S.

    Every implementation ("torch" here, "cpp" in `fastgrpo_kernels._C`, "triton" in
    `fastgrpo_kernels.offset_exp`) has this signature. No autograd, no host synchronisation.
    """
    C, V = logits.shape
    sum_exp = logits.new_empty(C)
    zy = logits.new_empty(C)
    moment = logits.new_empty(C) if entropy else None
    exps = logits if exp_dtype in (None, logits.dtype) else logits.view(exp_dtype)[:, :V]
    step = max(1, _BLOCK // max(V, 1)) if logits.device.type == "cpu" else max(C, 1)
    for start in range(0, C, step):
        rows = slice(start, min(start + step, C))
        z, y = logits[rows], targets[rows, None]
        transform_logits_(z, bias, logit_scale, softcap)
        if target_logit is None:
            column = y.clamp(0, V - 1)
            zy[rows] = torch.where(column == y, z.gather(1, column), torch.nan)[:, 0]
            y = column
        else:
            zy[rows] = target_logit[rows]
        z.sub_(zy[rows, None])
        if inv_temperature is not None:
            z.mul_(inv_temperature[rows, None])
        set_target_(z.exp_(), y, 0.0, sharded=target_logit is not None)
        torch.sum(z, 1, out=sum_exp[rows])
        if entropy:
            torch.sum(torch.special.entr(z), 1, out=moment[rows]).neg_()
        set_target_(z, y, -sum_exp[rows, None], sharded=target_logit is not None)
        if exps is not logits:
            exps[rows] = z.to(exp_dtype)  # .to() copies first: source and destination share bytes
    overflow = ~((sum_exp < exp_limit(logits.dtype)) & zy.isfinite())
    return OffsetExp(exps, sum_exp, zy, moment, overflow)


def set_target_(
    z: torch.Tensor, y: torch.Tensor, value: float | torch.Tensor, sharded: bool = False
) -> None:
    """z[i, y_i] = value_i in place; of sharded columns only where y_i lies in the shard."""
    if not sharded:
        z.scatter_(1, y, value.to(z.dtype) if isinstance(value, torch.Tensor) else value)
        return
    here = ((y >= 0) & (y < z.shape[1])).nonzero()[:, 0]
    columns = y[here, 0]
    z[here, columns] = value[here, 0].to(z.dtype) if isinstance(value, torch.Tensor) else value


def transform_logits_(
    z: torch.Tensor, bias: torch.Tensor | None, logit_scale: float, softcap: float | None
) -> torch.Tensor:
    """f(z) of `offset_exp`, in place."""
    if bias is not None:
        z.add_(bias)
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def exp_limit(dtype: torch.dtype) -> float:
    """exp(MAX_EXPONENT): any row with one larger exponent has a larger sum."""
    return float(torch.tensor(MAX_EXPONENT, dtype=dtype).exp())
