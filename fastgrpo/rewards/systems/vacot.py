# SPDX-License-Identifier: Apache-2.0
"""VACoT, by its abstract: a right answer, a bonus for a tool that was needed, brevity."""

from __future__ import annotations

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
    right = math_reward(text, solution=solution)
    length = len(completion_ids) if completion_ids is not None else text.count(" ") + 1
    excess = min(max(length / free_length - 1, 0.0), 1.0)
    used = "<tool_call>" in text and bool(tool_needed)
    return right + tool_bonus * right * used - max_penalty * excess
