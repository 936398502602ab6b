# SPDX-License-Identifier: Apache-2.0
"""What a loss type is; each is defined in one file of `fastgrpo.losses.types`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastgrpo.errors import InputError
from fastgrpo.losses.row import Row

LEVELS = ("token", "sequence")
LOSS_TYPES: dict[str, "LossType"] = {}


@dataclass(frozen=True)
class LossType:
    """The facts about a loss type that the ops, the engine and the trainers ask for.

    formula: Row -> (N,) policy loss of each token, differentiable in `row.logp`. Rollout weights,
        token weights, masks and KL terms are applied to what it returns.
    aggregation: how the terms are averaged unless the objective says otherwise.
    levels: the importance-sampling levels it is defined at.
    couples: a token's loss depends on other tokens of its sequence at any level.
    proportional: where a sequence's advantage is 0 its loss and gradient are 0, whatever the model.
    bounds: `delta` and `dual_clip` act on it.
    folds_rollout_weights: the formula uses `row.weights` itself; they must be per token.
    folds_entropy_mask: the formula uses `row.high_entropy` itself.
    clips: the formula sets the flags `row.metrics["clip_low"]` and `["clip_high"]`.
    metric: the name in `row.metrics` of a mean it reports, over the values of the level, or per
        sequence with metric_per_sequence.
    kernel: the formula of `fastgrpo_kernels.grpo_formulas` equal to it. None: the torch formula
        runs on any device, also inside the fused ops.
    """

    name: str
    formula: Callable[[Row], torch.Tensor]
    aggregation: str
    levels: tuple[str, ...] = ("token",)
    couples: bool = False
    proportional: bool = False
    bounds: bool = False
    folds_rollout_weights: bool = False
    folds_entropy_mask: bool = False
    clips: bool = False
    metric: str | None = None
    metric_per_sequence: bool = False
    kernel: str | None = None


def loss_type(name: str, aggregation: str, **facts) -> Callable:
    """Decorator: the function is the formula of the loss type `name`, which exists from then on."""

    def register(formula: Callable[[Row], torch.Tensor]) -> Callable[[Row], torch.Tensor]:
        if name in LOSS_TYPES:
            where = LOSS_TYPES[name].formula.__module__
            raise InputError(f"loss_type: {name!r} is defined already, by {where}")
        LOSS_TYPES[name] = LossType(name, formula, aggregation, **facts)
        return formula

    return register
