# SPDX-License-Identifier: Apache-2.0
"""VACoT, by its abstract: a right answer, a bonus for a tool that was needed, brevity."""

from __future__ import annotations

from typing import Any

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.systems.vlm_r1_answers import math_reward


@reward("vacot/total", columns=("solution",), optional=("tool_needed", "completion_ids"),
        range=(-0.5, 1.5), verifies=True,
        source="VACoT, our own reading of the abstract")  # fmt: skip
def vacot(
    text: str,
    *,
    solution: str,
    tool_needed: bool = True,
    completion_ids=None,
    tool_bonus: float = 0.5,
    max_penalty: float = 0.5,
    free_length: int = 512,
) -> float:
    """right + bonus [right, tool used, tool needed] - penalty for length.

    right is VLM-R1's mathematical match; a tool was used when there is a `<tool_call>`; the penalty
    grows linearly from `free_length` tokens (words without `completion_ids`) to `max_penalty` at
    twice that. VACoT's abstract has a conditional reward for tool use and a verbosity penalty; the
    constants are ours.
    """
    used = "<tool_call>" in text
    length = len(completion_ids) if completion_ids is not None else text.count(" ") + 1
    return _total(text, solution, used and bool(tool_needed), length, tool_bonus, max_penalty,
                  free_length)  # fmt: skip


@reward("vacot/episode", columns=("solution", "environments"), optional=("tool_needed",),
        range=(-0.5, 1.5), verifies=True,
        source="VACoT, our own reading of the abstract")  # fmt: skip
def episode(
    text: str,
    *,
    solution: str,
    environments: Any,
    tool_needed: bool = True,
    tool_bonus: float = 0.5,
    max_penalty: float = 0.5,
    free_length: int = 512,
) -> float:
    """`vacot/total` for a rollout in an environment: a tool was used when a call was served.

    The text is the last turn, and its words are its length: what tools return costs nothing.
    """
    used = any(step.ok for step in environments.steps) and bool(tool_needed)
    return _total(text, solution, used, text.count(" ") + 1, tool_bonus, max_penalty, free_length)


def _total(text, solution, used: bool, length: int, tool_bonus, max_penalty, free_length) -> float:
    right = math_reward(text, solution=solution)
    excess = min(max(length / free_length - 1, 0.0), 1.0)
    return right + tool_bonus * right * used - max_penalty * excess
