# SPDX-License-Identifier: Apache-2.0
"""Agent0-VL's return over self-verified steps (its README and a fork of its code)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.systems.vlm_r1_answers import math_reward

MAX_STEPS = 8


def step_rewards(
    steps: Sequence[Any], tool_weight: float, repair_cost: float, slope: float, threshold: float
) -> list[float]:
    """r_t = tool_weight [served] + score confidence - gate repair_cost [repaired] of each call.

    `score` and `confidence` are those of the `verify` after the call (0 without one); a call is a
    repair of the one before it where that one's confidence was below `threshold`, with gate =
    sigmoid(slope (threshold - confidence)).
    """
    rewards: list[float] = []
    doubt = None  # the confidence of a verdict that asks for a repair
    for step in steps:
        if step.tool == "verify":
            if step.ok:
                score, confidence = step.note
                rewards[-1] += score * confidence
                doubt = confidence if confidence < threshold else None
            continue
        value = tool_weight * step.ok
        if doubt is not None:
            value -= repair_cost / (1 + math.exp(-slope * (threshold - doubt)))
        rewards.append(value)
        doubt = None
    return rewards


@reward("agent0_vl/episode", columns=("solution", "environments"), verifies=True,
        range=(-MAX_STEPS * 1.05, 1 + MAX_STEPS * 1.3),
        source="the README and a fork of Agent0-VL")  # fmt: skip
def episode(
    text: str,
    *,
    solution: str,
    environments: Any,
    outcome_weight: float = 1.0,
    gamma: float = 0.99,
    tool_weight: float = 0.3,
    repair_cost: float = 0.05,
    slope: float = 5.0,
    threshold: float = 0.7,
) -> float:
    """outcome_weight right + sum_t gamma^(t-1) r_t over the calls of the rollout's environment.

    r_t as `step_rewards` has it; right is VLM-R1's mathematical match of the last turn. The
    published step reward also subtracts 0.01 KL of the step, which belongs to the objective here
    (`beta`); that the verdict is a tool is our own reading.
    """
    right = math_reward(text, solution=solution)
    steps = step_rewards(environments.steps, tool_weight, repair_cost, slope, threshold)
    return outcome_weight * right + sum(gamma**t * value for t, value in enumerate(steps))
