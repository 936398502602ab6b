# SPDX-License-Identifier: Apache-2.0
"""GMPO: the geometric mean of a sequence's clipped ratios."""

import torch

from fastgrpo.losses.loss_type import loss_type
from fastgrpo.losses.row import Row
from fastgrpo.losses.tokens import segment_sum


@loss_type(
    "gmpo",
    "seq-mean-token-mean",
    couples=True,
    proportional=True,
    folds_entropy_mask=True,
    clips=True,
    kernel="gmpo",
)
def gmpo(row: Row) -> torch.Tensor:
    obj, A, k = row.obj, row.A, row.k
    clipped = torch.where(A > 0, k.clamp(max=obj.clip_high), k.clamp(min=-obj.epsilon))
    acting = row.mask if row.high_entropy is None else row.high_entropy
    count = segment_sum(acting.to(k.dtype), row.seq_ids, row.num_rows).clamp(min=1.0)
    clipped = clipped.where(acting, torch.zeros_like(clipped))
    mean = segment_sum(clipped, row.seq_ids, row.num_rows) / count
    row.metrics["clip_low"] = (k.detach() < -obj.epsilon) & (A < 0)
    row.metrics["clip_high"] = (k.detach() > obj.clip_high) & (A > 0)
    return -(row.sequence_mean(A) * row.exp(mean))[row.seq_ids]
