# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of targets under softmax(hidden @ weight.T), in plain autograd PyTorch.

Letters: N rows, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F

from fastgrpo.losses.tokens import IGNORE


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """(N, V) logits f(hidden @ weight.T + bias) in at least float32, before the temperature.

    f(z) = softcap * tanh(logit_scale * z / softcap), or logit_scale * z without a softcap.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def target_logp(z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(z)_y as -softplus(lse of the other logits - z_y).

    Unlike z_y - logsumexp(z) it keeps its relative precision, and that of its gradient, when the
    target's probability is so close to 1 that the difference cancels.
    """
    y = targets[:, None]
    zy = z.gather(1, y)
    usable = zy.isfinite()
    others = (z - zy.where(usable, torch.zeros_like(zy))).scatter(1, y, -torch.inf)
    # A floor under the maximum: a row of -inf would turn the subtraction into NaN.
    m = others.detach().amax(1, keepdim=True).clamp(min=-1e4)
    S = (others - m).exp().sum(1)
    lse = torch.log(S.clamp(min=torch.finfo(S.dtype).tiny)) + m[:, 0]
    plain = z.log_softmax(1).gather(1, y)  # an infinite target logit: -inf, or NaN beside +inf
    return torch.where(usable[:, 0], -F.softplus(lse, threshold=60.0), plain[:, 0])


def entropy(z: torch.Tensor) -> torch.Tensor:
    """(N,) entropy of softmax(z); an entry of -inf contributes exactly 0, gradient included."""
    logp = z.log_softmax(1)
    possible = logp != -torch.inf
    logp = logp.where(possible, torch.zeros_like(logp))
    return -(logp.exp().where(possible, torch.zeros_like(logp)) * logp).sum(1)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    want_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(logp, entropy) of each row; rows whose target is -100 are 0 and are not computed.

        logp_n = log softmax(f(hidden_n @ weight.T + bias) / temperature_n)[targets_n]
        H_n    = -sum_j p_nj log p_nj

    with f of `head_logits`. Results in float32 (float64 from float64 inputs), differentiable in
    hidden, weight and bias.
    """
    rows = (targets != IGNORE).nonzero()[:, 0]
    y = targets[rows]
    z = head_logits(hidden[rows], weight, bias, softcap, logit_scale)
    z = z / (temperature[rows, None] if isinstance(temperature, torch.Tensor) else temperature)
    empty = z.new_zeros(len(targets))
    logp = empty.index_put((rows,), target_logp(z, y))
    return logp, empty.index_put((rows,), entropy(z)) if want_entropy else None
