# SPDX-License-Identifier: Apache-2.0
"""PPO's clipped ratio: grpo, bnpo, dr_grpo, dapo, luspo, and gspo_token."""

import torch

from fastgrpo.losses.loss_type import LEVELS, loss_type
from fastgrpo.losses.row import Row

_CLIPPED = {"proportional": True, "bounds": True, "clips": True}
_PPO = _CLIPPED | {"levels": LEVELS, "kernel": "clipped"}


@loss_type("grpo", "seq-mean-token-mean", **_PPO)
@loss_type("bnpo", "token-mean", **_PPO)
@loss_type("dr_grpo", "seq-mean-token-sum-norm", **_PPO)
@loss_type("dapo", "token-mean", **_PPO)
@loss_type("luspo", "seq-mean-token-sum", **_PPO)
def clipped(row: Row) -> torch.Tensor:
    return _clip(row, row.ratio)


@loss_type("gspo_token", "seq-mean-token-mean", couples=True, kernel="gspo_token", **_CLIPPED)
def gspo_token(row: Row) -> torch.Tensor:
    s = row.sequence_mean(row.k).detach().clamp(max=10.0)[row.seq_ids]
    return _clip(row, row.exp(s) * torch.exp(row.logp - row.logp.detach()))


def _clip(row: Row, ratio: torch.Tensor) -> torch.Tensor:
    obj, A = row.obj, row.A
    low, high = 1.0 - obj.epsilon, 1.0 + obj.clip_high
    bounded = ratio if obj.delta is None else ratio.clamp(max=obj.delta)
    loss = -torch.min(bounded * A, ratio.clamp(low, high) * A)
    if obj.dual_clip is not None:
        loss = torch.where(A < 0, torch.min(loss, -obj.dual_clip * A), loss)
    row.metrics["clip_low"] = (bounded.detach() < low) & (A < 0)
    row.metrics["clip_high"] = (bounded.detach() > high) & (A > 0)
    return loss
