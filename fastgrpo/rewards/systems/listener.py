# SPDX-License-Identifier: Apache-2.0
"""Listener, by third-party notes: format, choice, and how well a frozen model follows."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.tags import think_then_answer
from fastgrpo.rewards.systems.vlm_r1_answers import mcq


@reward("listener/total", columns=("solution", "listener_probability"),
        optional=("options", "choices", "problem"), range=(0.0, 2.0),
        source="Listener, our own reading of third-party notes")  # fmt: skip
def listener(
    text: str, *, solution: str, listener_probability: float, options=None, choices=None,
    problem=None,
) -> float:  # fmt: skip
    """format + 0.5 [right choice] + 0.5 * the listener's probability of the right choice.

    The probability comes from a frozen model that reads the reasoning (a restricted softmax over
    the choices). Weights from the notes; format and choice are VLM-R1's "fixed" rules.
    """
    form = float(think_then_answer(text) is not None)
    right = mcq(text, solution=solution, options=options, choices=choices, problem=problem)
    return form + 0.5 * right + 0.5 * min(max(float(listener_probability), 0.0), 1.0)
