# SPDX-License-Identifier: Apache-2.0
"""SAPO: a soft gate in place of the clip."""

import torch

from fastgrpo.losses.loss_type import LEVELS, loss_type
from fastgrpo.losses.row import Row


@loss_type("sapo", "seq-mean-token-mean", levels=LEVELS, proportional=True, kernel="sapo")
def sapo(row: Row) -> torch.Tensor:
    A, obj = row.A, row.obj
    tau = row.by_sign(A > 0, obj.sapo_temperature_pos, obj.sapo_temperature_neg)
    return -A * torch.sigmoid(tau * (row.ratio - 1.0)) * 4.0 / tau
