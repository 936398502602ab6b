# SPDX-License-Identifier: Apache-2.0
"""`rm_r1` as published (RM-R1-UIUC/RM-R1@d4c2542)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.systems import rm_r1 as fixed


@published(fixed.rm_r1)
def rm_r1(text: str, *, solution: str) -> float:
    """The right verdict in the last 80 characters and not the wrong one."""
    if solution not in fixed.VERDICTS:
        raise NotImplementedError(f"label {solution!r}")
    right, wrong = fixed.both(solution)
    return 1.0 if right in text[-80:] and wrong not in text[-80:] else -1.0
