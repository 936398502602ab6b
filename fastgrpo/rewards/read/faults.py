# SPDX-License-Identifier: Apache-2.0
"""How reading can fail, and the caps that keep it bounded."""

from __future__ import annotations


class Unscorable(ValueError):
    """The completion cannot be scored; the reward is the function's lowest value."""


class BadColumn(ValueError):
    """The data row itself is unusable; the reward is None, which trainers leave out."""


# What code working on parsed model text can raise. Anything else is our bug and surfaces.
TEXT_FAULTS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

# An answer is a few words; a longer one is not worth a quadratic comparison.
MAX_ANSWER = 8192


def short(text: str) -> str:
    """The text; Unscorable beyond `MAX_ANSWER` characters."""
    if len(text) > MAX_ANSWER:
        raise Unscorable("answer_too_long")
    return text
