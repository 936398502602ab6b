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
    """(N,) sum_j p_j (e^x_j - 1 - x_j), x = log q - log p: sum_j q_j - p_j = 0 added, so that no
    term is negative and nothing cancels when p is close to q."""
    log_p, log_q = z_p.log_softmax(1), z_q.log_softmax(1)
    possible = log_p != -torch.inf
    x = torch.where(possible, log_q - log_p, 0.0)
    p, q = log_p.exp(), log_q.exp()
    near = x.abs() < 1.0
    x_near = torch.where(near, x, 0.0)
    close = p * (torch.expm1(x_near) - x_near)
    far = q - p - p * torch.where(near, 0.0, x)
    return torch.where(near & possible, close, far).sum(1)
