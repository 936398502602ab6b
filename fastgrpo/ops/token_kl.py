"""token_kl: per-token KL estimators from the log-probs of the sampled tokens."""

import torch

from fastgrpo.checks import check_choice, check_positive, check_tensor
from fastgrpo.objective import ESTIMATORS
from fastgrpo.reference.token_kl import token_kl as reference


def token_kl(
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    estimator: str = "k3",
    *,
    log_ratio_clamp: float = 20.0,
    value_clamp: float | None = None,
) -> torch.Tensor:
    """Estimate KL(policy || reference) at each sampled token.

        x = clamp(ref_logp - logp, +-log_ratio_clamp)
        k1 = -x,   abs = |x|,   k2 = x^2 / 2,   k3 = e^x - 1 - x >= 0
        "k+" = the value of k with the gradient of k2 (straight through)

    logp, ref_logp: (N,) floating, of one shape; both differentiable ("+" forms as k2). Beyond the
    clamp, which keeps k3 finite, and beyond value_clamp the gradient is 0. A NaN stays NaN.
    Source: http://joschu.net/blog/kl-approx.html; names and clamps as in verl.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_positive("log_ratio_clamp", log_ratio_clamp)
    sizes: dict[str, int] = {}
    check_tensor("logp", logp, "N", like=sizes, floating=True)
    check_tensor("ref_logp", ref_logp, "N", like=sizes, floating=True, device=logp.device)
    return reference(logp, ref_logp, estimator, log_ratio_clamp, value_clamp)
