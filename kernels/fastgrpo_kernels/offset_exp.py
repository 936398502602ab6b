# SPDX-License-Identifier: Apache-2.0
"""The streaming pass of the one-pass loss: fp32 logits in, exponentials about the target logit out.

    f(z) = softcap * tanh(logit_scale * (z + bias) / softcap)     (no tanh without a softcap)
    E_j  = exp((f(z_j) - f(z_y)) * inv_temperature) for j != y,   S = sum_{j != y} E_j,   E_y := -S

One program per row reads the row once and writes it once; the target's logit is the offset, so no
pass for the maximum is needed and rows that would overflow are only flagged. Sums are fp32 in a
fixed order: results are bitwise reproducible and do not depend on the other rows.

E may be stored as bf16 over the fp32 logits it comes from. Element j of E then lies on bytes
[2j, 2j + 2) of the row and destroys logit j // 2. The block of columns [s, s + BLOCK) therefore
overwrites logits [s / 2, (s + BLOCK) / 2), all below s + BLOCK: they were loaded by this block or
by an earlier one of the same program. A barrier between the loads and the stores of each block
makes that hold for all threads of the program, whatever their relative progress, and no other
program touches the row.

Letters: C rows of a chunk, V vocabulary (of this shard).
"""

import math

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.exponentials import MAX_EXPONENT, OffsetExp
from fastgrpo_kernels.launch import launch

# exp(MAX_EXPONENT) in float32: a row with one larger exponent has a larger sum.
SUM_LIMIT = tl.constexpr(float(torch.tensor(MAX_EXPONENT).exp()))
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# 16 logits per thread in flight (four 16-byte loads) at eight warps; two sums of as many registers.
BLOCK, NUM_WARPS = 4096, 8


@triton.jit
def _tanh(x):
    """tanh, by its series near 0 where 1 - 2 / (e^2x + 1) would cancel; error below 2e-7."""
    s = x * x
    series = x + x * s * (
        -1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * (1382 / 155925))))
    )
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _transform(z, bias, logit_scale, softcap, SOFTCAP: tl.constexpr):
    z = (z + bias) * logit_scale
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


# Per-row arguments are slices of longer tensors: their alignment must not choose a variant.
@triton.jit(
    do_not_specialize_on_alignment=["targets_ptr", "inv_temperature_ptr", "given_target_logit_ptr"]
)
def _offset_exp_kernel(
    logits_ptr,
    exps_ptr,
    targets_ptr,
    inv_temperature_ptr,
    bias_ptr,
    given_target_logit_ptr,
    sum_exp_ptr,
    target_logit_ptr,
    moment_ptr,
    overflow_ptr,
    V,
    row_stride,
    exps_row_stride,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    OVERLAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    exps_ptr += row * exps_row_stride
    y = tl.load(targets_ptr + row)
    here = (y >= 0) & (y < V)
    if given_target_logit_ptr is not None:
        zy = tl.load(given_target_logit_ptr + row)
    else:
        by = 0.0
        if bias_ptr is not None:
            by = tl.load(bias_ptr + y, mask=here, other=0.0).to(tl.float32)
        # A target outside the vocabulary poisons its row instead of reading past it.
        zy = tl.load(logits_ptr + y, mask=here, other=float("nan"))
        zy = _transform(zy, by, logit_scale, softcap, SOFTCAP)
    scale = 1.0
    if inv_temperature_ptr is not None:
        scale = tl.load(inv_temperature_ptr + row)
    scale = scale * LOG2_E

    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        # Four columns per thread whatever the dtypes, so that every variant adds in one order.
        j = tl.max_contiguous(start + columns, 4)
        inside = j < V
        z = tl.load(logits_ptr + j, mask=inside, other=float("-inf"))
        b = 0.0
        if bias_ptr is not None:
            b = tl.load(bias_ptr + j, mask=inside, other=0.0).to(tl.float32)
        t = (_transform(z, b, logit_scale, softcap, SOFTCAP) - zy) * scale
        e = tl.where(inside & (j != y), tl.exp2(t), 0.0)
        sums += e
        if moment_ptr is not None:
            moments += tl.where(e > 0, e * t, 0.0)  # 0 ln 0 = 0
        if OVERLAY:
            tl.debug_barrier()  # no store before every thread has its loads
        tl.store(exps_ptr + j, e.to(exps_ptr.dtype.element_ty), mask=inside)

    s = tl.sum(sums, 0)
    tl.store(sum_exp_ptr + row, s)
    tl.store(target_logit_ptr + row, zy)
    tl.store(overflow_ptr + row, (s < SUM_LIMIT) & (tl.abs(zy) < float("inf")) == 0)
    if moment_ptr is not None:
        tl.store(moment_ptr + row, tl.sum(moments, 0) * LN_2)
    tl.debug_barrier()  # E_y := -S goes over the 0 another thread stored there
    tl.store(exps_ptr + y, (-s).to(exps_ptr.dtype.element_ty), mask=here)


@torch.library.custom_op("fastgrpo::offset_exp_triton", mutates_args=("logits", "out"))
def _offset_exp(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    target_logit: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    overlay: bool,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    C, V = logits.shape
    assert logits.dtype == torch.float32 and (logits.stride(1) == 1 or V == 1)
    assert not overlay or C < 2 or logits.stride(0) >= V, "rows must not overlap"
    assert out is None or (out.shape == logits.shape and (out.stride(1) == 1 or V == 1))
    exps = logits.view(torch.bfloat16) if overlay else logits
    exps = exps if out is None else out
    sum_exp, zy, moment, overflow = _outputs(logits, entropy)
    launch(
        _offset_exp_kernel,
        (C,),
        logits,
        logits,
        exps,
        targets.contiguous(),
        None if inv_temperature is None else inv_temperature.contiguous(),
        None if bias is None else bias.contiguous(),
        None if target_logit is None else target_logit.contiguous(),
        sum_exp,
        zy,
        moment if entropy else None,
        overflow,
        V,
        logits.stride(0),
        exps.stride(0),
        float(logit_scale),
        float(softcap or 1.0),
        SOFTCAP=softcap is not None,
        OVERLAY=overlay,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return sum_exp, zy, moment, overflow


@_offset_exp.register_fake
def _(
    logits,
    targets,
    inv_temperature,
    bias,
    target_logit,
    logit_scale,
    softcap,
    entropy,
    overlay,
    out,
):
    return _outputs(logits, entropy)


def _outputs(logits: torch.Tensor, entropy: bool) -> tuple[torch.Tensor, ...]:
    C = logits.shape[0]
    return (
        logits.new_empty(C),
        logits.new_empty(C),
        logits.new_empty(C if entropy else 0),
        logits.new_empty(C, dtype=torch.bool),
    )


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
    out: torch.Tensor | None = None,
) -> OffsetExp:
    """Replace a chunk of logits by exponentials about each row's target logit, in one sweep.

    logits (C, V) float32 with contiguous rows, overwritten; targets (C,) int64; inv_temperature
    (C,) float32 or None; bias (V,) or None. exp_dtype: float32 (None) or bfloat16, then E is
    `logits.view(torch.bfloat16)[:, :V]`; `out` (C, V), if given, receives it in its own dtype
    instead. A target outside [0, V) makes its row NaN and flags it.

    target_logit (C,) float32: f(z_y) when the vocabulary is sharded and the target may lie
    elsewhere: a target outside [0, V) then only means that every column counts into S. S and the
    moment add up over shards; E_y = -S of the shard that holds the target has to be replaced by
    the negated total.
    """
    V = logits.shape[1]
    assert exp_dtype in (None, torch.float32, torch.bfloat16)
    overlay = exp_dtype == torch.bfloat16 and out is None
    sum_exp, zy, moment, overflow = _offset_exp(
        logits,
        targets,
        inv_temperature,
        bias,
        target_logit,
        logit_scale,
        softcap,
        entropy,
        overlay,
        out,
    )
    exps = logits.view(torch.bfloat16)[:, :V] if overlay else logits
    exps = exps if out is None else out
    return OffsetExp(exps, sum_exp, zy, moment if entropy else None, overflow)


def aot_specs() -> list[KernelSpec]:
    signature = {
        "logits_ptr": "*fp32",
        "targets_ptr": "*i64",
        "sum_exp_ptr": "*fp32",
        "target_logit_ptr": "*fp32",
        "overflow_ptr": "*i1",
        "V": "i32:16",
        "row_stride": "i32:16",
        "exps_row_stride": "i32:16",
        "logit_scale": "fp32",
        "softcap": "fp32",
    }
    optional = {
        "inv_temperature_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "given_target_logit_ptr": "*fp32",
        "moment_ptr": "*fp32",
    }

    def spec(label: str, exps: str, softcap: bool, *present: str, overlay=True) -> KernelSpec:
        return KernelSpec(
            _offset_exp_kernel,
            signature | {"exps_ptr": exps} | {name: optional[name] for name in present},
            {name: None for name in optional if name not in present}
            | {"SOFTCAP": softcap, "OVERLAY": overlay and exps == "*bf16", "BLOCK": BLOCK},
            num_warps=NUM_WARPS,
            label=label,
        )

    return [
        spec("bf16", "*bf16", False, "inv_temperature_ptr"),
        spec("fp32", "*fp32", False, "inv_temperature_ptr"),
        spec("bf16 apart", "*bf16", False, "inv_temperature_ptr", overlay=False),
        spec("bf16 entropy", "*bf16", False, "inv_temperature_ptr", "moment_ptr"),
        spec("bf16 shard", "*bf16", False, "given_target_logit_ptr"),
        spec("bf16 all", "*bf16", True, "inv_temperature_ptr", "bias_ptr", "moment_ptr"),
    ]
