# SPDX-License-Identifier: Apache-2.0
"""Group-relative advantages, in plain PyTorch.

Letters: B rewards, P groups.
"""

import torch


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    num_groups: int,
    scale_rewards: str = "group",
    baseline: str = "mean",
    eps: float = 1e-4,
) -> torch.Tensor:
    """(B,) float64 advantages; NaN rewards are left out and get exactly 0.

    Two passes about each group's minimum: equal rewards are exactly 0 from the first subtraction
    on, with no residue for the division by std + eps to blow up.
    """
    scored = ~rewards.isnan()
    r = torch.where(scored, rewards.double(), 0.0)
    low = torch.full((num_groups,), torch.inf, dtype=r.dtype, device=r.device)
    low = low.scatter_reduce(0, group_ids, torch.where(scored, r, torch.inf), "amin")
    r = torch.where(scored, r - low[group_ids], 0.0)
    count = _sum(scored.double(), group_ids, num_groups)
    mean = _sum(r, group_ids, num_groups) / count.clamp(min=1.0)
    centred = torch.where(scored, r - mean[group_ids], 0.0)
    advantages = centred
    if baseline == "leave_one_out":
        advantages = centred * (count / (count - 1.0).clamp(min=1.0))[group_ids]
    if scale_rewards == "group":
        variance = _sum(centred**2, group_ids, num_groups) / (count - 1.0).clamp(min=1.0)
        advantages = advantages / (variance.sqrt() + eps)[group_ids]
    elif scale_rewards == "batch":
        advantages = advantages / (_batch_std(rewards, scored) + eps)
    return advantages


def _sum(x: torch.Tensor, group_ids: torch.Tensor, num_groups: int) -> torch.Tensor:
    return x.new_zeros(num_groups).index_add(0, group_ids, x)


def _batch_std(rewards: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of all scored rewards, 0 for fewer than two."""
    count = scored.sum().double()
    r = torch.where(scored, rewards.double(), 0.0)
    low = torch.where(scored, r, torch.inf).amin() if r.numel() else r.sum()
    r = torch.where(scored, r - low, 0.0)
    centred = torch.where(scored, r - r.sum() / count.clamp(min=1.0), 0.0)
    return ((centred**2).sum() / (count - 1.0).clamp(min=1.0)).sqrt()
