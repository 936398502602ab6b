# SPDX-License-Identifier: Apache-2.0
"""`vicrit` as published (si0wang/ViCrit@727f1ee)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.systems import vicrit as fixed


@published(fixed.answer_reward)
def answer_reward(text: str, *, original_noun_phrase: str, changed_noun_phrase: str) -> float:
    """The first changed word is a substring of the answer; equal phrases raise IndexError."""
    said = fixed.boxed_or_last_line(text).lower()
    changed = fixed.changed_tokens(original_noun_phrase.lower(), changed_noun_phrase.lower())
    return float(changed[0] in said)


@published(fixed.total)
def total(text: str, *, original_noun_phrase: str, changed_noun_phrase: str) -> float:
    """0.9 of the published answer reward + 0.1 format."""
    right = answer_reward(
        text,
        original_noun_phrase=original_noun_phrase,
        changed_noun_phrase=changed_noun_phrase,
    )
    return 0.9 * right + 0.1 * fixed.format_reward(text)
