# SPDX-License-Identifier: Apache-2.0
"""KL estimators from the log-probs of sampled tokens, in plain autograd PyTorch."""

import torch


def token_kl(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    estimator: str = "k3",
    log_ratio_clamp: float = 20.0,
    value_clamp: float | None = None,
) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference); see `fastgrpo.token_kl` for the formulas."""
    x = (ref_logp - logp).clamp(-log_ratio_clamp, log_ratio_clamp)
    if estimator.endswith("+"):
        value = _estimate(x.detach(), estimator[:-1])
        surrogate = _estimate(x, "k2")
        kl = value + surrogate - surrogate.detach()
    else:
        kl = _estimate(x, estimator)
    return kl if value_clamp is None else kl.clamp(-value_clamp, value_clamp)


def _estimate(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "k1":
        return -x
    if name == "abs":
        return x.abs()
    if name == "k2":
        return 0.5 * x * x
    # expm1: e^x - x - 1 would cancel to noise, or below zero, near x = 0
    return torch.expm1(x) - x
