# SPDX-License-Identifier: Apache-2.0
"""VESPO: a smooth weight of the whole sequence's importance ratio."""

import math

import torch

from fastgrpo.losses.loss_type import LEVELS, loss_type
from fastgrpo.losses.row import Row

_LOW = math.log(1e-8)


@loss_type(
    "vespo",
    "token-mean",
    levels=LEVELS,
    couples=True,
    proportional=True,
    folds_rollout_weights=True,
    metric="vespo/phi_seq_mean",
    metric_per_sequence=True,
    kernel="vespo",
)
def vespo(row: Row) -> torch.Tensor:
    obj, A = row.obj, row.A
    log_w = row.sequence_sum(row.k.detach().clamp(-20.0, 20.0))
    if row.weights is not None:
        log_w = log_w + row.sequence_sum(row.weights.log().clamp(_LOW, 20.0))
    log_w = log_w.clamp(_LOW, 20.0)[row.seq_ids]
    k = row.by_sign(A >= 0, obj.vespo_k_pos, obj.vespo_k_neg)
    lam = row.by_sign(A >= 0, obj.vespo_lambda_pos, obj.vespo_lambda_neg).clamp(min=1e-4)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp()).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    row.metrics["vespo/phi_seq_mean"] = phi
    return -phi * A * row.logp
