# SPDX-License-Identifier: Apache-2.0
"""Agent0-VL's environment: tools for the solver, and the verdict of the same model on its steps."""

from __future__ import annotations

from fastgrpo.environments.environment import Environment, ToolFault, tool
from fastgrpo.environments.tools.calculator import calculate


class Agent0VL(Environment):
    """At most eight calls, as published; `agent0_vl/episode` reads them.

    The system's verifier is the model in another role. Here that role is the tool `verify`, which
    judges the call before it: our own reading.
    """

    def __init__(self, max_calls: int = 8):
        super().__init__(max_calls)

    @tool
    def calculator(self, expression: str) -> str:
        """
        Computes an arithmetic expression.

        Args:
            expression: Numbers with + - * / // % ^, brackets, and functions such as sqrt.

        Returns:
            The value.
        """
        try:
            value = calculate(expression)
        except ValueError as fault:
            raise ToolFault(str(fault)) from fault
        return f"{value:.12g}", value

    @tool
    def verify(self, score: float, confidence: float) -> str:
        """
        Records how right the step before was. A step that is not sure should be done again.

        Args:
            score: From -1 (wrong) to 1 (right).
            confidence: How sure this is, from 0 to 1.

        Returns:
            What to do next.
        """
        if not self.steps or self.steps[-1].tool == "verify":
            raise ToolFault("there is no new step to verify")
        for name, value, low in (("score", score, -1), ("confidence", confidence, 0)):
            if type(value) not in (int, float) or not low <= value <= 1:
                raise ToolFault(f"{name}: expected a number from {low} to 1, got {value!r}")
        return "Noted.", (float(score), float(confidence))


ENVIRONMENT = Agent0VL
