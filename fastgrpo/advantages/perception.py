# SPDX-License-Identifier: Apache-2.0
"""Token masks and trajectory weights from how much a token depends on the image (VPPO, PAPO).

N packed completion tokens, B sequences; ``seq_ids`` (N,) non-decreasing in 0..B-1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.errors import InputError


def visual_dependency(
    logp: Tensor, perturbed_logp: Tensor, *, log_ratio_clamp: float = 20.0, ceiling: float = 10.0
) -> Tensor:
    """s_t = clamp(e^d - d - 1, 0, ceiling), d = clamp(logp_perturbed - logp, +-log_ratio_clamp).

    Both log-prob streams (N,) come from the old policy, without gradient. Source: VPPO
    (huaixuheqing/VPPO-RL, ``dp_actor.py``).
    """
    d = (perturbed_logp - logp).clamp(-log_ratio_clamp, log_ratio_clamp)
    return (torch.expm1(d) - d).clamp(0.0, ceiling)


def _starts(seq_ids: Tensor, num_sequences: int) -> Tensor:
    lengths = torch.bincount(seq_ids, minlength=num_sequences)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def top_share_mask(scores: Tensor, seq_ids: Tensor, share: float, mask: Tensor | None = None):
    """(N,) bool: the ceil(share n_i) highest scores of each sequence of n_i unmasked tokens.

    Ties go to the earlier token. ``mask`` (N,) excludes tokens from selection and from n_i.
    Source: VPPO's perception mask (share 0.4); the published sort leaves ties undefined.
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"share: expected a value in (0, 1], got {share}")
    keep = torch.ones_like(seq_ids, dtype=torch.bool) if mask is None else mask.bool()
    num_sequences = int(seq_ids[-1]) + 1 if len(seq_ids) else 0
    counts = torch.zeros(num_sequences, dtype=torch.long, device=seq_ids.device)
    counts.scatter_add_(0, seq_ids, keep.long())
    wanted = torch.ceil(counts.float() * share).long()
    order = torch.argsort(scores.masked_fill(~keep, -torch.inf), descending=True, stable=True)
    order = order[torch.argsort(seq_ids[order], stable=True)]
    starts = _starts(seq_ids, num_sequences)
    rank = torch.arange(len(seq_ids), device=seq_ids.device) - starts[seq_ids]
    chosen = torch.zeros_like(keep)
    chosen[order] = rank < wanted[seq_ids]
    return chosen & keep


def quantile_mask(scores: Tensor, seq_ids: Tensor, share: float, mask: Tensor | None = None):
    """(N,) bool: tokens at or above the (1 - share) quantile of their own sequence's scores.

    Linear interpolation between order statistics. Source: PAPO's optional token mask
    (MikeWangWZHL/PAPO, ``dp_actor.py``, share 0.2).
    """
    keep = torch.ones_like(seq_ids, dtype=torch.bool) if mask is None else mask.bool()
    chosen = torch.zeros_like(keep)
    lengths = torch.bincount(seq_ids).tolist() if len(seq_ids) else []
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        values = scores[rows][keep[rows]]
        if len(values):
            chosen[rows] = scores[rows] >= torch.quantile(values, 1.0 - share)
        start += length
    return chosen & keep


def sequence_mean(scores: Tensor, seq_ids: Tensor, num_sequences: int, mask: Tensor | None = None):
    """(B,) mean score of each sequence's unmasked tokens; 0 for a sequence without any."""
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    total = scores.new_zeros(num_sequences)
    total.scatter_add_(0, seq_ids, torch.where(keep, scores, 0.0))
    count = scores.new_zeros(num_sequences)
    count.scatter_add_(0, seq_ids, keep.to(scores.dtype))
    return total / count.clamp(min=1)


def trajectory_weights(
    dependency: Tensor,
    *,
    minimum: float = 0.9,
    valid: Tensor | None = None,
    mean_over: Sequence[int] | None = None,
) -> Tensor:
    """VPPO's advantage weights w = m + s (1 - m) / (mean(s) + 1e-8), (B,), of mean 1.

    s = clamp((S - min S) / (max S - min S), 0, 1) over the *mini-batch*; S = ``dependency`` (B,) is
    each trajectory's mean visual dependency, m = ``minimum``. ``valid`` (B,) excludes empty
    trajectories (weight 1). All weights are 1 when fewer than two trajectories are valid or all
    S are equal to 1e-6.

    Every statistic is over the mini-batch, so the micro-batch size changes nothing. The published
    code takes mean(s) over each micro-batch: ``mean_over`` gives the micro-batch sizes to
    reproduce that. Source: VPPO (``dp_actor.py``, ``advantage_scaling_min`` 0.9).
    """
    valid = torch.ones_like(dependency, dtype=torch.bool) if valid is None else valid.bool()
    weights = torch.ones_like(dependency)
    known = dependency[valid]
    if len(known) < 2 or known.max() - known.min() <= 1e-6:
        return weights
    share = ((dependency - known.min()) / (known.max() - known.min())).clamp(0.0, 1.0)
    start = 0
    for size in [len(dependency)] if mean_over is None else mean_over:
        rows = slice(start, start + size)
        inside = valid[rows]
        if inside.any():
            s = share[rows][inside]
            top = minimum + (1.0 - minimum) / (s.mean() + 1e-8)
            weights[rows] = torch.where(inside, minimum + share[rows] * (top - minimum), 1.0)
        start += size
    return weights
