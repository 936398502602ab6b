# SPDX-License-Identifier: Apache-2.0
"""Per-token KL estimates from two streams of log-probs, and their slopes.

    x = clamp(ref - logp, +-log_ratio_clamp)
    k1 = -x    k2 = x^2 / 2    k3 = e^x - 1 - x    abs = |x|
    "k+" has the value of k and the gradient of k2. The result is clamped to +-value_clamp.

Element-wise; NaN stays NaN.
"""

import math

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch

BLOCK = 1024


@triton.jit
def clamp(x, low, high):
    """x limited to [low, high]; unlike the hardware's minimum and maximum it keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def excess(x):
    """e^x - 1 - x without cancellation near 0."""
    series = 1 / 5040 + x * (1 / 40320 + x * (1 / 362880))
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * series))
    series = x * x * (0.5 + x * (1 / 6 + x * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0 - x)


@triton.jit
def kl_estimate(x, value_clamp, ESTIMATOR: tl.constexpr, PLUS: tl.constexpr):
    """(value, d value / d x) of one estimator, 0 slope where the value is clamped."""
    if ESTIMATOR == "k1":
        value = -x
        slope = tl.zeros_like(x) - 1.0
    elif ESTIMATOR == "abs":
        value = tl.abs(x)
        slope = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    elif ESTIMATOR == "k2":
        value = 0.5 * x * x
        slope = x
    else:
        value = excess(x)
        slope = value + x
    if PLUS:
        slope = x
    slope = tl.where(tl.abs(value) <= value_clamp, slope, 0.0)
    return clamp(value, -value_clamp, value_clamp), slope


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["logp_ptr", "ref_ptr"])
def _token_kl_kernel(
    logp_ptr,
    ref_ptr,
    kl_ptr,
    slope_ptr,
    N,
    log_ratio_clamp,
    value_clamp,
    ESTIMATOR: tl.constexpr,
    PLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    logp = tl.load(logp_ptr + i, mask=inside, other=0.0).to(tl.float32)
    ref = tl.load(ref_ptr + i, mask=inside, other=0.0).to(tl.float32)
    x = ref - logp
    value, slope = kl_estimate(
        clamp(x, -log_ratio_clamp, log_ratio_clamp), value_clamp, ESTIMATOR, PLUS
    )
    tl.store(kl_ptr + i, value, mask=inside)
    tl.store(slope_ptr + i, tl.where(tl.abs(x) <= log_ratio_clamp, slope, 0.0), mask=inside)


@torch.library.custom_op("fastgrpo::token_kl_triton", mutates_args=())
def _token_kl(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    estimator: str,
    log_ratio_clamp: float,
    value_clamp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    kl, slope = _outputs(logp)
    N = logp.numel()
    launch(
        _token_kl_kernel,
        (triton.cdiv(N, BLOCK),),
        logp,
        logp.contiguous(),
        ref_logp.contiguous(),
        kl,
        slope,
        N,
        log_ratio_clamp,
        value_clamp,
        ESTIMATOR=estimator.removesuffix("+"),
        PLUS=estimator.endswith("+"),
        BLOCK=BLOCK,
    )
    return kl, slope


@_token_kl.register_fake
def _(logp, ref_logp, estimator, log_ratio_clamp, value_clamp):
    return _outputs(logp)


def _outputs(logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kl = torch.empty(logp.shape, dtype=torch.float32, device=logp.device)
    return kl, torch.empty_like(kl)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx, dkl: torch.Tensor | None, _dslope):
    if dkl is None:
        return None, None, None, None, None
    dx = dkl * ctx.saved_tensors[0]
    return (-dx).to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), None, None, None


_token_kl.register_autograd(_backward, setup_context=_save)


def token_kl(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    estimator: str = "k3",
    log_ratio_clamp: float = 20.0,
    value_clamp: float | None = None,
    slope: bool = False,
) -> torch.Tensor:
    """(N,) float32 estimate of KL(policy || reference), differentiable in both log-probs; with
    slope=True its derivative by ref_logp - logp instead."""
    limit = math.inf if value_clamp is None else float(value_clamp)
    return _token_kl(logp, ref_logp, estimator, float(log_ratio_clamp), limit)[slope]


def aot_specs() -> list[KernelSpec]:
    return [
        KernelSpec(
            _token_kl_kernel,
            {
                **{f"{name}_ptr": "*fp32" for name in ("logp", "ref", "kl", "slope")},
                "N": "i32",
                "log_ratio_clamp": "fp32",
                "value_clamp": "fp32",
            },
            {"ESTIMATOR": estimator, "PLUS": False, "BLOCK": BLOCK},
            label=estimator,
        )
        for estimator in ("k1", "k2", "k3", "abs")
    ]
