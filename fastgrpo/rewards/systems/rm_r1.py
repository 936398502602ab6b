# SPDX-License-Identifier: Apache-2.0
"""RM-R1's reward of a judge (RM-R1-UIUC/RM-R1@d4c2542)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.faults import BadColumn

VERDICTS = {"model_a": "<answer>[[A]]</answer>", "model_b": "<answer>[[B]]</answer>"}


@reward("rm_r1/answer", columns=("solution",), range=(-1.0, 1.0),
        source="RM-R1-UIUC/RM-R1@d4c2542",
        truth=lambda *, solution, **columns: VERDICTS[solution])  # fmt: skip
def rm_r1(text: str, *, solution: str) -> float:
    """+1 when the verdict `<answer>[[A]]</answer>` or B is the solution's, else -1.

    The solution is "model_a" or "model_b".

    Source: RM-R1-UIUC/RM-R1@d4c2542, `answer_reward`. "upstream": only the last 80 characters are
    searched, and the other verdict must not be there. "fixed": the last verdict of the text counts
    wherever it stands; an unknown solution gives None.
    """
    if solution not in VERDICTS:
        raise BadColumn("solution is neither model_a nor model_b")
    right, wrong = both(solution)
    return 1.0 if text.rfind(right) > text.rfind(wrong) else -1.0


def both(solution: str) -> tuple[str, str]:
    """The right verdict and the wrong one."""
    return VERDICTS[solution], VERDICTS["model_b" if solution == "model_a" else "model_a"]
