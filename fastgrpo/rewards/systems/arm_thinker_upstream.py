# SPDX-License-Identifier: Apache-2.0
"""`arm_thinker` as published (InternLM/ARM-Thinker@96b1baf)."""

from __future__ import annotations

from typing import Any

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.systems import arm_thinker as fixed


@published(fixed.arm_thinker)
def arm_thinker(text: str, *, solution: Any) -> float:
    """The tool's words count wherever they stand."""
    said = fixed.verdict(fixed.last_turn(text), None)
    return fixed.ladder(said, solution, "<tool_response>" in text, fixed.ZOOMED in text)
