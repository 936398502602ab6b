"""Reward functions by name: TRL's signature, bounded input, a defined value for any text.

A reward is written for one row (`score(text, *, <columns>, <params>, compat)`) or, with
`batched=True`, for all rows (`score(texts, note, *, <lists of columns>, <params>, compat)`). The
registry turns it into `f(prompts, completions, **columns) -> list[float | None]`.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards import math_pool

log = logging.getLogger("fastgrpo.rewards")

# Longer completions (in UTF-8) are not read at all: about 250k tokens, far beyond any rollout.
MAX_BYTES = 1 << 20


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

_SPECS: dict[str, Spec] = {}
_STATS: dict[str, Counter] = {}
_RUN_KWARGS = ("trainer_state",)


@dataclass(frozen=True)
class Spec:
    name: str
    score: Callable[..., Any]
    columns: tuple[str, ...]
    range: tuple[float, float]
    upstream_range: tuple[float, float]
    source: str
    batched: bool
    verifies: bool
    fallback: float
    doc: str
    optional: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)


def reward(
    name: str,
    *,
    columns: Sequence[str] = (),
    optional: Sequence[str] = (),
    range: tuple[float, float] = (0.0, 1.0),
    upstream_range: tuple[float, float] | None = None,
    source: str,
    batched: bool = False,
    verifies: bool = False,
    fallback: float | None = None,
    presets: dict[str, dict[str, Any]] | None = None,
):
    """Register the decorated scorer as `name`.

    `optional` columns are passed when the batch has them. `verifies`: the scorer asks `math_pool`,
    so the rows of a batch are asked together. `fallback` is the value of a completion
    that cannot be scored (default: the lowest). `presets` registers further names with other
    defaults of the scorer's parameters.
    """

    def register(score: Callable[..., Any]) -> Callable[..., Any]:
        known = {*columns, *optional, *_RUN_KWARGS, "compat"}
        signature = inspect.signature(score).parameters.values()
        defaults = {
            p.name: p.default
            for p in signature
            if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in known
        }
        for entry, changed in {name: {}, **(presets or {})}.items():
            if entry in _SPECS:
                raise InputError(f"reward {entry!r} is registered twice")
            _SPECS[entry] = Spec(
                name=entry,
                score=score,
                columns=tuple(columns),
                range=range,
                upstream_range=upstream_range or range,
                source=source,
                batched=batched,
                verifies=verifies,
                fallback=range[0] if fallback is None else fallback,
                doc=inspect.cleandoc(score.__doc__ or ""),
                optional=tuple(optional),
                params={**defaults, **changed},
            )
        return score

    return register


class Reward:
    """A reward function: `f(prompts, completions, **columns) -> list[float | None]`.

    `.name` is the registry's name, `.__name__` what trainers log it under, `.columns` the columns
    it needs, `.optional` those it uses when present, `.range` its lowest and highest value,
    `.compat` "fixed" or "upstream", `.params` its settings.
    """

    def __init__(self, spec: Spec, compat: str, params: dict[str, Any]):
        self.name, self.__name__ = spec.name, spec.name.replace("/", "_")
        self.__qualname__, self.__doc__ = self.__name__, spec.doc
        self.columns, self.optional, self.source = spec.columns, spec.optional, spec.source
        self.range = spec.range if compat == "fixed" else spec.upstream_range
        self.compat, self.params, self._spec = compat, {**spec.params, **params}, spec
        accepted = set(inspect.signature(spec.score).parameters)
        self._run_kwargs = tuple(k for k in _RUN_KWARGS if k in accepted)

    def __repr__(self) -> str:
        return f"Reward({self.name!r}, compat={self.compat!r})"

    def __call__(self, prompts=None, completions=None, **columns) -> list[float | None]:
        if completions is None:
            raise InputError(f"{self.name}: completions: expected a list, got None")
        size = len(completions)
        if prompts is not None:
            columns["prompts"] = prompts
        given = self._columns(columns, size)
        extra = {k: columns.get(k) for k in self._run_kwargs}
        if self.compat == "fixed":
            return self._fixed(completions, given, extra)
        texts = [_cap(completion_text(c)) for c in completions]
        return self._score(texts, lambda i, reason: None, given, extra)

    def _columns(self, columns: dict[str, Any], size: int) -> dict[str, Sequence[Any]]:
        given = {}
        for key in (*self.columns, *self.optional):
            values = columns.get(key)
            if values is None and key in self.columns:
                raise InputError(f"{self.name}: column {key!r} is missing; it needs {self.columns}")
            if values is None:
                continue
            if isinstance(values, str) or len(values) != size:
                raise InputError(
                    f"{self.name}: column {key!r}: expected one value per completion ({size}), "
                    f"got {type(values).__name__} of length {len(values)}"
                )
            given[key] = values
        return given

    def _score(self, texts, note, given, extra) -> list[Any]:
        settings = {**self.params, **extra, "compat": self.compat}
        if self._spec.batched:
            return self._spec.score(texts, note, **given, **settings)
        row_wise = guarded if not self._spec.verifies else verified
        return row_wise(self._spec.score, texts, note, given, settings, self._spec.fallback)

    def _fixed(self, completions, given, extra) -> list[float | None]:
        rewards: list[float | None] = [self._spec.fallback] * len(completions)
        readable, texts = [], []
        for i, completion in enumerate(completions):
            try:
                text = completion_text(completion)
            except TEXT_FAULTS:
                self._count("not_text")
                continue
            if _too_long(text):
                self._count("too_long")
                continue
            readable.append(i)
            texts.append(text)
        rows = {k: [v[i] for i in readable] for k, v in given.items()}
        scored = self._score(texts, lambda i, reason: self._count(reason), rows, extra)
        for i, value in zip(readable, scored, strict=True):
            rewards[i] = self._bounded(value)
        return rewards

    def _bounded(self, value: float | None) -> float | None:
        if value is None:
            return None
        value, (low, high) = float(value), self.range
        if not math.isfinite(value):
            self._count("not_finite")
            return self._spec.fallback
        # Rounding may leave a hair beyond the range; a real excess is a bug of ours, counted.
        if value < low - 1e-6 or value > high + 1e-6:
            self._count("out_of_range")
        return min(max(value, low), high)

    def _count(self, reason: str) -> None:
        counts = _STATS.setdefault(self.name, Counter())
        counts[reason] += 1
        if counts[reason] == 1:
            log.warning("%s: %s (further ones are only counted, see stats())", self.name, reason)


def verified(score, texts, note, columns, settings, fallback: float) -> list[float | None]:
    """`guarded`, with the mathematical questions of all rows asked in one batch before."""
    if len(texts) > 1:
        with math_pool.together():
            for i, text in enumerate(texts):
                try:
                    score(text, **row_of(columns, i), **settings)
                except (*TEXT_FAULTS, NotImplementedError):
                    continue
    return guarded(score, texts, note, columns, settings, fallback)


def row_of(columns: dict[str, Sequence[Any]], i: int) -> dict[str, Any]:
    """One row; where merged data sets have no value for an optional column, its default holds."""
    kept = {key: column[i] for key, column in columns.items()}
    return {key: v for key, v in kept.items() if v is not None or key in ("solution", "answer")}


def guarded(score, texts, note, columns, settings, fallback: float) -> list[float | None]:
    """A row-wise scorer over all rows; in "fixed" mode its faults become values and notes."""
    values: list[float | None] = []
    for i, text in enumerate(texts):
        row = row_of(columns, i)
        if settings["compat"] == "upstream":
            values.append(score(text, **row, **settings))
            continue
        try:
            values.append(score(text, **row, **settings))
        except InputError:
            raise
        except BadColumn as fault:
            note(i, f"bad_column: {fault}")
            values.append(None)
        except TEXT_FAULTS as fault:
            note(i, str(fault) if type(fault) is Unscorable else type(fault).__name__)
            values.append(fallback)
    return values


def completion_text(completion: Any) -> str:
    """The text of a plain or conversational completion (its last assistant message)."""
    if isinstance(completion, str):
        text = completion
    elif isinstance(completion, dict):
        text = _content_text(completion["content"])
    else:
        said = [m for m in completion if m.get("role") == "assistant"] or [completion[-1]]
        text = _content_text(said[-1]["content"])
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates; every parser below works on UTF-8
        text = text.encode("utf-8", "replace").decode()
    return text


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _too_long(text: str) -> bool:
    # At most four bytes per character, so most texts need not be encoded.
    return len(text) > MAX_BYTES or (4 * len(text) > MAX_BYTES and len(text.encode()) > MAX_BYTES)


def _cap(text: str) -> str:
    return "" if _too_long(text) else text


def get(name: str, compat: str = "fixed", **params: Any) -> Reward:
    """The reward called `name`, as `f(prompts, completions, **columns) -> list[float | None]`.

    `compat="fixed"` (default) never raises out of model text: a completion that cannot be scored
    gets the function's fallback value and is counted in `stats()`, and every value lies in
    `.range`. `compat="upstream"` behaves as the published code, exceptions included. `params`
    are the scorer's own settings. Unknown names and settings raise InputError.
    """
    if name not in _SPECS:
        close = [n for n in _SPECS if name.split("/")[-1] in n] or sorted(_SPECS)
        raise InputError(f"name: no reward {name!r}; nearest: {', '.join(sorted(close)[:8])}")
    if compat not in ("fixed", "upstream"):
        raise InputError(f"compat: expected 'fixed' or 'upstream', got {compat!r}")
    spec = _SPECS[name]
    unknown = sorted(set(params) - set(spec.params))
    if unknown:
        raise InputError(f"{name}: unknown setting {unknown[0]!r}; it has {sorted(spec.params)}")
    return Reward(spec, compat, params)


def names() -> list[str]:
    """All registered rewards, sorted."""
    return sorted(_SPECS)


def stats() -> dict[str, dict[str, int]]:
    """Per reward: how many completions were given the fallback value, by reason."""
    return {name: dict(counts) for name, counts in _STATS.items()}


def reset_stats() -> None:
    _STATS.clear()


def progress(trainer_state: Any, step: int | None, total_steps: int | None) -> tuple[int, int]:
    """(step, total steps) from explicit settings or else from the trainer's state."""
    if step is None and trainer_state is not None:
        step = trainer_state.global_step
    if total_steps is None and trainer_state is not None:
        total_steps = trainer_state.max_steps
    return step, total_steps
