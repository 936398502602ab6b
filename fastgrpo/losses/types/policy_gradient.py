# SPDX-License-Identifier: Apache-2.0
"""Plain policy gradients: gpg, reinforce, and dro with its penalty."""

import torch

from fastgrpo.losses.loss_type import loss_type
from fastgrpo.losses.row import Row


@loss_type("gpg", "token-mean", proportional=True, kernel="reinforce")
@loss_type("reinforce", "token-mean", proportional=True, kernel="reinforce")
def reinforce(row: Row) -> torch.Tensor:
    return -row.logp * row.A


# Not proportional: the penalty acts whatever the advantage.
@loss_type("dro", "token-mean", kernel="dro")
def dro(row: Row) -> torch.Tensor:
    return -(row.logp * row.A - 0.5 * row.obj.dro_beta * row.k**2)
