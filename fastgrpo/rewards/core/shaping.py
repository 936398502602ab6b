# SPDX-License-Identifier: Apache-2.0
"""Reward shaping: relative to reference rewards, to running statistics, along a trajectory's steps.

B completions, M reference rewards each, K steps. Source of the PAR family: PorUna-byte/PAR,
``trainers/reward_shaper.py``.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastgrpo.errors import InputError


def _relative(rewards: Tensor, references: Tensor, max_references: int) -> Tensor:
    """(B, M) differences r - r_ref, with at most ``max_references`` references."""
    if rewards.ndim != 1 or references.ndim != 2 or len(references) != len(rewards):
        raise InputError(
            f"rewards, references: expected (B,) and (B, M), got {tuple(rewards.shape)} and "
            f"{tuple(references.shape)}"
        )
    return rewards[:, None] - references[:, :max_references]


def par(
    rewards: Tensor, references: Tensor, *, sigmoid_k: float = 1.0, max_references: int = 10
) -> Tensor:
    """Preference as reward: (1/M) sum_m sigmoid(k (r - r_m)), (B,), in (0, 1)."""
    return torch.sigmoid(sigmoid_k * _relative(rewards, references, max_references)).mean(1)


def centered(rewards: Tensor, references: Tensor, *, max_references: int = 10) -> Tensor:
    """(1/M) sum_m (r - r_m), (B,)."""
    return _relative(rewards, references, max_references).mean(1)


def relative_tanh(rewards: Tensor, references: Tensor, *, max_references: int = 10) -> Tensor:
    """(1/M) sum_m tanh(r - r_m), (B,), in (-1, 1)."""
    return torch.tanh(_relative(rewards, references, max_references)).mean(1)


def relative_arctan(rewards: Tensor, references: Tensor, *, max_references: int = 10) -> Tensor:
    """(1/M) sum_m arctan(r - r_m), (B,)."""
    return torch.atan(_relative(rewards, references, max_references)).mean(1)


@cache
def _sigmoid_polynomial() -> tuple[float, ...]:
    """Coefficients, highest power first, of the 5th-degree least-squares fit of sigmoid on
    100 points of [-5, 5]."""
    x = np.linspace(-5.0, 5.0, 100)
    return tuple(np.polyfit(x, 1.0 / (1.0 + np.exp(-x)), 5))


def fitted_polynomial(rewards: Tensor, references: Tensor, *, max_references: int = 10) -> Tensor:
    """(1/M) sum_m q(r - r_m), q the 5th-degree fit of sigmoid on [-5, 5], 0 and 1 outside."""
    x = _relative(rewards, references, max_references)
    value = torch.zeros_like(x)
    for coefficient in _sigmoid_polynomial():
        value = value * x + coefficient
    return torch.where(x <= -5, 0.0, torch.where(x >= 5, 1.0, value)).mean(1)


def log_sigmoid_centered(
    rewards: Tensor, references: Tensor, *, percentile: float = 0.85
) -> Tensor:
    """log sigmoid(r - q), q the ``percentile`` of a normal fitted to the references, (B,).

    q = mean + (std + 1e-5) Phi^-1(percentile) with the unbiased std of the M references, M >= 2.
    """
    if references.shape[1] < 2:
        raise InputError(f"references: need at least 2 per reward, got {references.shape[1]}")
    quantile = math.sqrt(2.0) * torch.erfinv(torch.tensor(2.0 * percentile - 1.0)).item()
    point = references.mean(1) + (references.std(1) + 1e-5) * quantile
    return torch.nn.functional.logsigmoid(rewards - point)


class RunningShaper:
    """Shape rewards with statistics of all rewards seen so far, each batch counted before use.

    ``meanstd``: (r - mean) / std (std 0: only centred); ``clip``: clamp to mean +- std;
    ``minmax``: (r - min) / (max - min), 0 where all rewards seen are equal. The std is the
    population's. State travels in checkpoints by ``state_dict``.
    """

    KINDS = ("meanstd", "clip", "minmax")

    def __init__(self, kind: str) -> None:
        if kind not in self.KINDS:
            raise InputError(f"kind: expected one of {', '.join(self.KINDS)}, got {kind!r}")
        self.kind = kind
        self.count, self.mean, self.sum_of_squares = 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf

    def __call__(self, rewards: Tensor) -> Tensor:
        """Shaped rewards, (B,); NaN rewards stay NaN and are not counted."""
        self._update(rewards[~rewards.isnan()].double())
        if not self.count:
            return rewards.clone()
        std = math.sqrt(self.sum_of_squares / self.count)
        if self.kind == "meanstd":
            return (rewards - self.mean) / (std or 1.0)
        if self.kind == "clip":
            return rewards.clamp(self.mean - std, self.mean + std)
        return (rewards - self.low) / ((self.high - self.low) or 1.0)

    def _update(self, rewards: Tensor) -> None:
        new = len(rewards)
        if not new:
            return
        total = self.count + new
        delta = rewards.mean().item() - self.mean
        self.mean += delta * new / total
        spread = rewards.var(unbiased=False).item() * new
        self.sum_of_squares += spread + delta**2 * self.count * new / total
        self.count = total
        self.low = min(self.low, rewards.min().item())
        self.high = max(self.high, rewards.max().item())

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs to go on with the same statistics."""
        return {k: v for k, v in vars(self).items() if k != "kind"}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what ``state_dict`` returned."""
        vars(self).update(state)


def clip_step_rewards(rewards: Tensor, eta: float = 0.0) -> Tensor:
    """Clip: r'_k = min(r_k - eta, 0), so that extra steps never add reward.

    Source: "On Designing Effective RL Reward"; its eta is not published, the default 0 is ours.
    """
    return (rewards - eta).clamp(max=0.0)


def delta_step_rewards(rewards: Tensor) -> Tensor:
    """Delta: r'_k = r_k - r_{k+1}, the last scored step keeps r, the answer step gets 0.

    ``rewards`` (K,) are the process rewards of one trajectory, the answer step last. The sum of the
    result is the first reward: repeating a good step gains nothing. Source: "On Designing
    Effective RL Reward".
    """
    if rewards.ndim != 1:
        raise InputError(f"rewards: expected (K,), got {tuple(rewards.shape)}")
    shaped = torch.zeros_like(rewards)
    if len(rewards) > 1:
        shaped[:-1] = rewards[:-1]
        shaped[:-2] -= rewards[1:-1]
    return shaped
