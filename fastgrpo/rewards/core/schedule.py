# SPDX-License-Identifier: Apache-2.0
"""Any weight, threshold or coefficient as a function of training progress."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastgrpo.errors import InputError

KINDS = ("constant", "linear", "cosine", "exponential", "steps")


@dataclass(frozen=True)
class Schedule:
    """A scalar that depends on progress r = step / total.

    It goes from ``start`` at r = 0 to ``end`` at r = ``until``.

    ==============  ==================================================================
    kind            value at r (x = min(r / until, 1))
    ==============  ==================================================================
    ``constant``    start
    ``linear``      start + x (end - start)
    ``cosine``      end + (start - end) (1 + cos(pi x)) / 2
    ``exponential`` start exp(-rate r)
    ``steps``       the value of the first (boundary, value) with r <= boundary, else the last
    ==============  ==================================================================

    ``steps`` boundaries are inclusive, as in V-Triune's dynamic IoU threshold
    ``Schedule.steps([(0.10, 0.85), (0.25, 0.95), (1.0, 0.99)])``. SophiaVL-R1 decays its thinking
    reward with ``exponential`` (rate = total / T).
    """

    kind: str = "constant"
    start: float = 0.0
    end: float = 0.0
    until: float = 1.0
    rate: float = 1.0
    values: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0.0 < self.until <= 1.0:
            raise InputError(f"until: expected a share of training in (0, 1], got {self.until}")
        boundaries = [b for b, _ in self.values]
        if self.kind == "steps" and (not boundaries or boundaries != sorted(boundaries)):
            raise InputError(
                f"values: expected (boundary, value) pairs in order, got {self.values}"
            )

    @classmethod
    def steps(cls, values: Sequence[tuple[float, float]]) -> Schedule:
        """A piecewise constant schedule of (inclusive upper boundary of r, value) pairs."""
        return cls("steps", values=tuple((float(b), float(v)) for b, v in values))

    @classmethod
    def parse(cls, spec: float | Mapping | Schedule) -> Schedule:
        """A number, a mapping of this class's fields (as in a recipe's YAML), or a schedule."""
        if isinstance(spec, Schedule):
            return spec
        if isinstance(spec, (int, float)) and not isinstance(spec, bool):
            return cls("constant", start=float(spec))
        if not isinstance(spec, Mapping):
            raise InputError(f"schedule: expected a number or a mapping, got {type(spec).__name__}")
        unknown = set(spec) - set(cls.__dataclass_fields__)
        if unknown:
            raise InputError(f"schedule: unknown fields {sorted(unknown)}")
        if "values" in spec:
            return cls.steps(spec["values"])
        return cls(**spec)

    def __call__(self, step: int, total: int) -> float:
        """The value at ``step`` of ``total`` optimizer steps."""
        if total <= 0:
            raise InputError(f"total: expected a positive number of steps, got {total}")
        progress = min(max(step / total, 0.0), 1.0)
        if self.kind == "constant":
            return self.start
        if self.kind == "exponential":
            return self.start * math.exp(-self.rate * progress)
        if self.kind == "steps":
            index = bisect_left([b for b, _ in self.values], progress)
            return self.values[min(index, len(self.values) - 1)][1]
        x = min(progress / self.until, 1.0)
        if self.kind == "linear":
            return self.start + x * (self.end - self.start)
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * x)) / 2.0
