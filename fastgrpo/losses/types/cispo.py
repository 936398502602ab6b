# SPDX-License-Identifier: Apache-2.0
"""CISPO: the clipped ratio as a constant weight of the log-prob."""

import torch

from fastgrpo.losses.loss_type import LEVELS, loss_type
from fastgrpo.losses.row import Row


@loss_type(
    "cispo",
    "token-mean",
    levels=LEVELS,
    proportional=True,
    metric="cispo_clip_ratio",
    kernel="cispo",
)
def cispo(row: Row) -> torch.Tensor:
    obj, A = row.obj, row.A
    low = None if obj.cispo_clip == "absolute" else 1.0 - obj.epsilon
    high = obj.clip_high if obj.cispo_clip == "absolute" else 1.0 + obj.clip_high
    r = row.ratio.detach()
    row.metrics["cispo_clip_ratio"] = (r > high) & (A > 0)
    return -r.clamp(low, high) * A * row.logp
