# SPDX-License-Identifier: Apache-2.0
"""token_kl: per-token KL estimators from the log-probs of the sampled tokens."""

import torch

from fastgrpo.checks import check_choice, check_positive, check_tensor
from fastgrpo.errors import InputError
from fastgrpo.objective import ESTIMATORS
from fastgrpo.ops.select import select
from fastgrpo.reference.token_kl import token_kl as reference


def token_kl(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    estimator: str = "k3",
    *,
    log_ratio_clamp: float = 20.0,
    value_clamp: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Estimate KL(policy || reference) at each sampled token.

        x = clamp(ref_logp - logp, +-log_ratio_clamp)
        k1 = -x,   abs = |x|,   k2 = x^2 / 2,   k3 = e^x - 1 - x >= 0
        "k+" = the value of k with the gradient of k2 (straight through)

    logp, ref_logp: (N,) floating, of one shape; both differentiable ("+" forms as k2). Beyond the
    clamp, which keeps k3 finite, and beyond value_clamp the gradient is 0. A NaN stays NaN.
    impl: "reference", or "triton", which computes in float32: the default on CUDA but for float64.
    Source: http://joschu.net/blog/kl-approx.html; names and clamps as in verl.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_positive("log_ratio_clamp", log_ratio_clamp)
    sizes: dict[str, int] = {}
    check_tensor("logp", logp, "N", like=sizes, floating=True)
    check_tensor("ref_logp", ref_logp, "N", like=sizes, floating=True, device=logp.device)
    wide = torch.float64 in (logp.dtype, ref_logp.dtype)
    if wide and impl == "triton":
        raise InputError("impl: token_kl cannot run as 'triton': a log-prob is float64")
    if select("token_kl", logp.device, "reference" if wide else impl) == "reference":
        return reference(logp, ref_logp, estimator, log_ratio_clamp, value_clamp)
    from fastgrpo_kernels.token_kl import token_kl as kernel

    dtype = torch.promote_types(logp.dtype, ref_logp.dtype)
    return kernel(logp, ref_logp, estimator, log_ratio_clamp, value_clamp).to(dtype)
