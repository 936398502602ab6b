# SPDX-License-Identifier: Apache-2.0
"""Full-vocabulary KL between two projections, in plain autograd PyTorch.

Letters: N rows, V vocabulary.
"""

import torch


def linear_kl(
    hidden_p: torch.Tensor,
    weight_p: torch.Tensor,
    hidden_q: torch.Tensor,
    weight_q: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """(N,) KL(p || q), p = softmax(hidden_p @ weight_p.T / temperature), q likewise."""
    dtype = torch.promote_types(hidden_p.dtype, torch.float32)
    logits = (
        hidden_p.to(dtype) @ weight_p.to(dtype).T / temperature,
        hidden_q.to(dtype) @ weight_q.to(dtype).T / temperature,
    )
    return kl_of_logits(*logits)


def kl_of_logits(z_p: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """(N,) sum_j p_j (log p_j - log q_j) with 0 log 0 = 0."""
    log_p, log_q = z_p.log_softmax(1), z_q.log_softmax(1)
    possible = log_p != -torch.inf
    return (log_p.exp() * torch.where(possible, log_p - log_q, 0.0)).sum(1)
