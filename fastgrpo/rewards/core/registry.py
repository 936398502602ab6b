# SPDX-License-Identifier: Apache-2.0
"""Reward functions by name: TRL's signature, bounded input, a defined value for any text.

A reward is written for one row (`score(text, *, <columns>, <settings>)`) or, with `batched=True`,
for all rows (`score(texts, note, *, <lists of columns>, <settings>)`). `published` puts the
behaviour of the published code beside it. The registry turns both into
`f(prompts, completions, **columns) -> list[float | None]`.
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
from fastgrpo.rewards.core.guard import MAX_BYTES, guarded, scored_row, too_long, verified
from fastgrpo.rewards.geometry import frames
from fastgrpo.rewards.read.chat import completion_text
from fastgrpo.rewards.read.faults import TEXT_FAULTS

log = logging.getLogger("fastgrpo.rewards")

Scorer = Callable[..., Any]

_SPECS: dict[str, Spec] = {}
_PUBLISHED: dict[Scorer, tuple[Scorer, bool]] = {}
_STATS: dict[str, Counter] = {}
_RUN_KWARGS = ("trainer_state",)


@dataclass(frozen=True)
class Spec:
    """What `reward` was told about one name."""

    name: str
    score: Scorer
    columns: tuple[str, ...]
    range: tuple[float, float]
    upstream_range: tuple[float, float]
    source: str
    batched: bool
    verifies: bool
    fallback: float
    truth: Callable[..., str] | None = None
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
    framed: bool | dict[str, str] = False,
    fallback: float | None = None,
    truth: Callable[..., str] | None = None,
    presets: dict[str, dict[str, Any]] | None = None,
):
    """Register the decorated scorer as `name`.

    `optional` columns are passed when the batch has them. `verifies`: the scorer asks `math_pool`,
    so the rows of a batch are asked together. `framed`: it compares boxes or points and is handed
    `frames`, a `RowFrames` (a list of them when batched), made from the columns and settings that
    `geometry.frames` names; a dict gives those settings other defaults. `fallback` is the value of
    a completion that cannot be scored (default: the lowest). `truth(<columns>, frames)` writes the
    answer that must reach the top. `presets` registers further names with other defaults of the
    scorer's settings.
    """

    def register(score: Scorer) -> Scorer:
        defaults = _defaults(score, (*columns, *optional))
        if framed:
            own = framed if isinstance(framed, dict) else {}
            defaults = dict.fromkeys(frames.SETTINGS) | own | defaults
        extra = [c for c in frames.COLUMNS if c not in columns] if framed else []
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
                truth=truth,
                optional=tuple(dict.fromkeys([*optional, *extra])),
                params={**defaults, **changed},
            )
        return score

    return register


def _defaults(score: Scorer, columns: Sequence[str]) -> dict[str, Any]:
    """The scorer's own settings: its keyword-only arguments that are no columns."""
    taken = {*columns, *_RUN_KWARGS, "frames"}
    parameters = inspect.signature(score).parameters.values()
    keywords = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: p.default for p in keywords if p.name not in taken}


def settings_of(spec: Spec, compat: str) -> dict[str, Any]:
    """The settings of a reward with their defaults, those of its published scorer too."""
    if compat == "fixed" or spec.score not in _PUBLISHED:
        return spec.params
    columns = (*spec.columns, *spec.optional)
    return {**_defaults(_PUBLISHED[spec.score][0], columns), **spec.params}


def published(fixed: Scorer, *, batched: bool = False):
    """Register the decorated scorer as what compat="upstream" of `fixed`'s names calls.

    It scores one row, or all with `batched=True`, and raises what the published code raises. A
    reward without one behaves the same in both modes.
    """

    def register(score: Scorer) -> Scorer:
        _PUBLISHED[fixed] = (score, batched)
        return score

    return register


class Reward:
    """A reward function: `f(prompts, completions, **columns) -> list[float | None]`.

    `.name` is the registry's name, `.__name__` what trainers log it under, `.columns` the columns
    it needs, `.optional` those it uses when present, `.range` its lowest and highest value,
    `.compat` "fixed" or "upstream", `.params` its settings, `.framed` whether it reads frames.
    """

    def __init__(self, spec: Spec, compat: str, params: dict[str, Any]):
        self.name, self.__name__ = spec.name, spec.name.replace("/", "_")
        self.__qualname__ = self.__name__
        self.__doc__ = inspect.cleandoc(spec.score.__doc__ or "")
        self.columns, self.optional, self.source = spec.columns, spec.optional, spec.source
        self.range = spec.range if compat == "fixed" else spec.upstream_range
        score, batched = spec.score, spec.batched
        if compat == "upstream":
            score, batched = _PUBLISHED.get(score, (score, batched))
        accepted = inspect.signature(score).parameters
        self.compat, self.params, self._spec = compat, {**settings_of(spec, compat), **params}, spec
        self._score, self._batched = score, batched
        self._run_kwargs = tuple(k for k in _RUN_KWARGS if k in accepted)
        self.framed = "frames" in accepted
        self._columns = tuple(c for c in (*spec.columns, *spec.optional) if c in accepted)
        self._settings = {k: v for k, v in self.params.items() if k in accepted}

    def __repr__(self) -> str:
        return f"Reward({self.name!r}, compat={self.compat!r})"

    def __call__(self, prompts=None, completions=None, **columns) -> list[float | None]:
        if completions is None:
            raise InputError(f"{self.name}: completions: expected a list, got None")
        if prompts is not None:
            columns["prompts"] = prompts
        given = self._given(columns, len(completions))
        settings = self._settings | {k: columns.get(k) for k in self._run_kwargs}
        if self.compat == "upstream":
            return self._upstream(completions, given, settings)
        return self._fixed(completions, given, settings)

    def _given(self, columns: dict[str, Any], size: int) -> dict[str, Sequence[Any]]:
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

    def frames_of(
        self, columns: dict[str, Sequence[Any]], size: int, texts: Sequence[str] | None = None
    ) -> list[frames.RowFrames]:
        """The frames of `size` rows, as the scorer is handed them; `texts` may name images."""
        return frames.row_frames(columns, size, self.params, texts)

    @property
    def prescribed_frame(self) -> str | None:
        """The frame that the answer's own format prescribes, whatever the model's family."""
        return self._spec.params.get("answer_frame")

    @property
    def makes_truth(self) -> bool:
        """Whether `truth` makes an answer."""
        return self._spec.truth is not None

    def truth(self, columns: dict[str, Any], row: frames.RowFrames) -> str:
        """The answer made from one row's columns that must reach the top; see `makes_truth`.

        `row` says the frame to write it in. Raises BadColumn for a solution that cannot be used.
        """
        names = (*self.columns, *self.optional)
        given = {k: columns[k] for k in names if columns.get(k) is not None}
        return self._spec.truth(**{"solution": None} | given, frames=row)

    def _upstream(self, completions, given, settings) -> list[Any]:
        texts = [completion_text(c) for c in completions]
        texts = ["" if too_long(text) else text for text in texts]
        given = {k: given[k] for k in self._columns if k in given}
        if self._batched:
            return self._score(texts, lambda i, reason: None, **given, **settings)
        return [
            self._score(text, **scored_row(given, i), **settings) for i, text in enumerate(texts)
        ]

    def _fixed(self, completions, given, settings) -> list[float | None]:
        # Plain ASCII needs no look at its parts and its encoding.
        plain = [type(c) is str and c.isascii() and len(c) <= MAX_BYTES for c in completions]
        readable, texts = None, completions
        if not all(plain):
            read = [self._text(c) for c in completions]
            readable = [i for i, text in enumerate(read) if text is not None]
            texts = [read[i] for i in readable]
            given = {k: [v[i] for i in readable] for k, v in given.items()}
        rows = {k: given[k] for k in self._columns if k in given}
        if self.framed:
            rows["frames"] = self.frames_of(given, len(texts), texts)
        low, high = self.range
        scored = [
            v if type(v) is float and low <= v <= high else self._bounded(v)
            for v in self._scores(texts, rows, settings)
        ]
        if readable is None:
            return scored
        rewards: list[float | None] = [self._spec.fallback] * len(completions)
        for i, value in zip(readable, scored, strict=True):
            rewards[i] = value
        return rewards

    def _text(self, completion: Any) -> str | None:
        """The text of a completion, None and counted when it has none or too much."""
        try:
            text = completion_text(completion)
        except TEXT_FAULTS:
            self._count("not_text")
            return None
        if too_long(text):
            self._count("too_long")
            return None
        return text

    def _scores(self, texts, rows, settings) -> list[float | None]:
        def note(i: int, reason: str) -> None:
            self._count(reason)

        if self._batched:
            return self._score(texts, note, **rows, **settings)
        row_wise = verified if self._spec.verifies else guarded
        return row_wise(self._score, texts, note, rows, settings, self._spec.fallback)

    def _bounded(self, value: float | None) -> float | None:
        if value is None:
            return None
        value, (low, high) = float(value), self.range
        if low <= value <= high:
            return value
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
    known = settings_of(spec, compat)
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise InputError(f"{name}: unknown setting {unknown[0]!r}; it has {sorted(known)}")
    return Reward(spec, compat, params)


def names() -> list[str]:
    """All registered rewards, sorted."""
    return sorted(_SPECS)


def stats() -> dict[str, dict[str, int]]:
    """Per reward: how many completions were given the fallback value, by reason."""
    return {name: dict(counts) for name, counts in _STATS.items()}


def reset_stats() -> None:
    _STATS.clear()
