# SPDX-License-Identifier: Apache-2.0
"""PCPG, by its abstract: the character error rate."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.faults import BadColumn
from fastgrpo.rewards.read.tags import last_answer


@reward("pcpg/cer", columns=("solution",), source="PCPG, our own reading of the abstract",
        truth=lambda *, solution, **columns: str(solution))  # fmt: skip
def character_error(text: str, *, solution: str) -> float:
    """max(0, 1 - CER), CER = character edits / characters of the solution.

    PCPG trains lip reading on the character error rate; the clipping at 0 is ours.
    """
    from rapidfuzz.distance import Levenshtein

    said, truth = last_answer(text).strip(), str(solution).strip()
    if not truth:
        raise BadColumn("solution is empty")
    if len(said) > 16 * len(truth) + 1024:
        return 0.0
    return max(0.0, 1 - Levenshtein.distance(said, truth) / len(truth))
