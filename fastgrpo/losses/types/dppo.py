# SPDX-License-Identifier: Apache-2.0
"""DPPO: a trust region on the token's probability, by total variation or by binary KL."""

import torch

from fastgrpo.losses.loss_type import loss_type
from fastgrpo.losses.row import Row


@loss_type("dppo_tv", "token-mean", proportional=True, clips=True, kernel="dppo_tv")
def dppo_tv(row: Row) -> torch.Tensor:
    moved = row.logp.detach().exp() - row.old.exp()
    high, low = row.obj.clip_high, -row.obj.epsilon
    return _within(row, (row.A > 0) & (moved > high), (row.A < 0) & (moved < low))


@loss_type("dppo_kl", "token-mean", proportional=True, clips=True, kernel="dppo_kl")
def dppo_kl(row: Row) -> torch.Tensor:
    logp, old = row.logp.detach(), row.old
    p, p_old = logp.exp(), old.exp()
    tiny = torch.finfo(p.dtype).tiny
    rest, rest_old = (-torch.expm1(logp)).clamp(min=tiny), (-torch.expm1(old)).clamp(min=tiny)
    kl = p_old * (old - logp) + rest_old * (rest_old.log() - rest.log())
    up, down = (row.A > 0) & (p > p_old), (row.A < 0) & (p < p_old)
    return _within(row, up & (kl > row.obj.clip_high), down & (kl > row.obj.epsilon))


def _within(row: Row, above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    row.metrics["clip_low"], row.metrics["clip_high"] = below, above
    loss = -row.A * row.ratio.detach().clamp(max=20.0) * row.logp
    return loss.where(~(above | below), torch.zeros_like(loss))
