# SPDX-License-Identifier: Apache-2.0
"""Scoring row by row: faults of a completion or a row become values and notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.faults import TEXT_FAULTS, BadColumn, Unscorable

# note(i, reason): completion i was not scored.
Note = Callable[[int, str], None]
Columns = Mapping[str, Sequence[Any]]

# Longer completions (in UTF-8) are not read at all: about 250k tokens, far beyond any rollout.
MAX_BYTES = 1 << 20


def too_long(text: str) -> bool:
    """Whether a completion is beyond `MAX_BYTES`."""
    # At most four bytes per character, so most texts need not be encoded.
    return len(text) > MAX_BYTES or (4 * len(text) > MAX_BYTES and len(text.encode()) > MAX_BYTES)


def scored_row(columns: Columns, i: int) -> dict[str, Any]:
    """One row; where merged data sets have no value for an optional column, its default holds."""
    kept = {key: column[i] for key, column in columns.items()}
    return {key: v for key, v in kept.items() if v is not None or key in ("solution", "answer")}


def guarded(
    score: Callable, texts: Sequence[str], note: Note, columns: Columns, settings: Mapping,
    fallback: float,
) -> list[float | None]:  # fmt: skip
    """A row-wise scorer over all rows: what it cannot score is `fallback` and a note.

    A row that is unusable itself (BadColumn) is None. InputError passes: the call is wrong.
    """
    values: list[float | None] = []
    for i, text in enumerate(texts):
        try:
            values.append(score(text, **scored_row(columns, i), **settings))
        except InputError:
            raise
        except BadColumn as fault:
            note(i, f"bad_column: {fault}")
            values.append(None)
        except TEXT_FAULTS as fault:
            note(i, str(fault) if type(fault) is Unscorable else type(fault).__name__)
            values.append(fallback)
    return values


def verified(
    score: Callable, texts: Sequence[str], note: Note, columns: Columns, settings: Mapping,
    fallback: float,
) -> list[float | None]:  # fmt: skip
    """`guarded`, with the mathematical questions of all rows asked in one batch before."""
    if len(texts) > 1:
        with math_pool.together():
            for i, text in enumerate(texts):
                try:
                    score(text, **scored_row(columns, i), **settings)
                except (*TEXT_FAULTS, NotImplementedError):
                    continue
    return guarded(score, texts, note, columns, settings, fallback)
