# SPDX-License-Identifier: Apache-2.0
"""Rewards made of rewards: schedules, gates, shaping, votes and trust, in TRL's signature.

B completions of a batch, G completions of one prompt, consecutive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.columns import progress, row_columns, row_of
from fastgrpo.rewards.core.schedule import Schedule
from fastgrpo.rewards.core.shaping import (
    RunningShaper,
    centered,
    clip_step_rewards,
    delta_step_rewards,
    fitted_polynomial,
    log_sigmoid_centered,
    par,
    relative_arctan,
    relative_tanh,
)
from fastgrpo.rewards.core.votes import (
    cross_vote_rewards,
    majority_vote_rewards,
    trust_weighted_rewards,
)
from fastgrpo.rewards.read.chat import completion_text

RELATIVE = {
    "par": par,
    "centered": centered,
    "tanh": relative_tanh,
    "arctan": relative_arctan,
    "polynomial": fitted_polynomial,
    "log_sigmoid": log_sigmoid_centered,
}


class Composite:
    """A reward function made of ``parts``: their columns, prefetch and bind are passed on."""

    def __init__(self, name: str, parts: Sequence[Callable], columns: Sequence[str] = ()):
        self.name = name
        self.__name__ = name.replace("/", "_")
        self.parts = list(parts)
        inner = [c for part in parts for c in getattr(part, "columns", ())]
        self.columns = tuple(dict.fromkeys([*columns, *inner]))
        self.range = (-math.inf, math.inf)

    def prefetch(self, prompts: Sequence, completions: Sequence, **columns: Any) -> None:
        """Start the parts that can work ahead."""
        for part in self.parts:
            if hasattr(part, "prefetch"):
                part.prefetch(prompts, completions, **columns)

    def bind(self, trainer: Any) -> None:
        """Hand the trainer to the parts that need its model."""
        for part in self.parts:
            if hasattr(part, "bind"):
                part.bind(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What the parts keep between batches; {} for parts that keep nothing."""
        kept = {
            str(i): part.state_dict()
            for i, part in enumerate(self.parts)
            if hasattr(part, "state_dict")
        }
        return {i: state for i, state in kept.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for i, kept in state.items():
            self.parts[int(i)].load_state_dict(kept)


def _progress(trainer_state: Any) -> tuple[int, int]:
    """(step, total) of the run; (0, 1) outside a trainer."""
    step, total = progress(trainer_state)
    return step or 0, max(total or 1, 1)


class Scheduled(Composite):
    """weight(step, total) times a reward: a reward weight that changes while training."""

    def __init__(self, reward: Callable, weight: Schedule, name: str | None = None):
        super().__init__(name or f"{reward.__name__}_scheduled", [reward])
        self.weight = weight

    def __call__(self, prompts, completions, *, trainer_state=None, **columns):
        """The inner rewards times the weight of this step; None stays None."""
        weight = self.weight(*_progress(trainer_state))
        inner = self.parts[0](
            prompts=prompts, completions=completions, trainer_state=trainer_state, **columns
        )
        return [None if r is None else weight * r for r in inner]


class Gated(Composite):
    """R = sum_i w_i r_i where the gate is above ``threshold``, else the gate itself.

    VRAG-RL: gate = format, R = 0.7 judge + 0.1 gate + 0.2 nDCG if gate > 0 else gate.
    """

    def __init__(
        self,
        gate: Callable,
        rewards: Sequence[Callable],
        weights: Sequence[float],
        *,
        gate_weight: float = 0.0,
        threshold: float = 0.0,
        name: str = "gated",
    ):
        if len(rewards) != len(weights):
            raise InputError(f"weights: expected {len(rewards)} values, got {len(weights)}")
        super().__init__(name, [gate, *rewards])
        self.weights, self.gate_weight, self.threshold = list(weights), gate_weight, threshold

    def __call__(self, prompts, completions, **columns):
        """One reward a completion; None where the gate or an open row's part is None."""
        gates, *inner = (
            part(prompts=prompts, completions=completions, **columns) for part in self.parts
        )
        return [self._one(gate, row) for gate, *row in zip(gates, *inner, strict=True)]

    def _one(self, gate: float | None, row: list[float | None]) -> float | None:
        if gate is None or gate <= self.threshold:
            return gate
        if any(r is None for r in row):
            return None
        return self.gate_weight * gate + sum(w * r for w, r in zip(self.weights, row, strict=True))


class Annotated(Composite):
    """A reward that reads one more column, made for the whole batch at once.

    ``annotate(prompts, completions, **columns) -> list`` fills ``column``: a judge's replies, say,
    which the reward then parses (Perception-R1's ``judge_output``).
    """

    def __init__(self, reward: Callable, column: str, annotate: Callable, name: str | None = None):
        super().__init__(name or reward.__name__, [reward])
        self.column, self.annotate = column, annotate
        self.columns = tuple(c for c in self.columns if c != column)

    def __call__(self, prompts, completions, **columns):
        """The inner reward with the column filled in."""
        columns[self.column] = self.annotate(prompts=prompts, completions=completions, **columns)
        return self.parts[0](prompts=prompts, completions=completions, **columns)

    def prefetch(self, prompts: Sequence, completions: Sequence, **columns: Any) -> None:
        """Start what fills the column, if it can work ahead."""
        owner = getattr(self.annotate, "__self__", self.annotate)
        if hasattr(owner, "prefetch"):
            owner.prefetch(prompts, completions, **columns)


class Relative(Composite):
    """A reward shaped against reference rewards of the same prompt, the PAR family.

    ``kind``: par, centered, tanh, arctan, polynomial, log_sigmoid (see ``advantages.shaping``).
    The column ``reference_rewards`` holds each row's list of rewards of reference answers, all of
    the same length, scored beforehand by the same reward.
    """

    def __init__(self, reward: Callable, kind: str = "par", name: str | None = None, **options):
        if kind not in RELATIVE:
            raise InputError(f"kind: expected one of {sorted(RELATIVE)}, got {kind!r}")
        super().__init__(name or f"{reward.__name__}_{kind}", [reward], ["reference_rewards"])
        self.shape, self.options = RELATIVE[kind], options

    def __call__(self, prompts, completions, *, reference_rewards, **columns):
        """Shaped rewards; None where the inner reward is None."""
        inner = self.parts[0](prompts=prompts, completions=completions, **columns)
        rewards = torch.tensor([math.nan if r is None else r for r in inner], dtype=torch.float64)
        references = torch.tensor(reference_rewards, dtype=torch.float64)
        return _numbers(self.shape(rewards, references, **self.options))


class Running(Composite):
    """A reward shaped with the statistics of all rewards so far: meanstd, clip or minmax."""

    def __init__(self, reward: Callable, kind: str = "meanstd", name: str | None = None):
        super().__init__(name or f"{reward.__name__}_{kind}", [reward])
        self.shaper = RunningShaper(kind)

    def state_dict(self) -> dict[str, Any]:
        """The statistics so far, beside what the inner reward keeps."""
        return super().state_dict() | {"shaper": self.shaper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        inner = dict(state)
        self.shaper.load_state_dict(inner.pop("shaper"))
        super().load_state_dict(inner)

    def __call__(self, prompts, completions, **columns):
        """Shaped rewards; None where the inner reward is None."""
        inner = self.parts[0](prompts=prompts, completions=completions, **columns)
        rewards = torch.tensor([math.nan if r is None else r for r in inner], dtype=torch.float64)
        return _numbers(self.shaper(rewards))


class MajorityVote(Composite):
    """1 for agreeing with the majority answer of one's own group, else 0.

    ``extract`` maps a completion's text to its answer or None.
    """

    def __init__(self, extract: Callable[[str], str | None], group_size: int, name="majority_vote"):
        super().__init__(name, [])
        self.extract, self.group_size = extract, group_size
        self.range = (0.0, 1.0)

    def __call__(self, prompts, completions, **columns):
        """Votes inside each group of ``group_size`` consecutive completions."""
        answers = [self.extract(completion_text(c)) for c in completions]
        return [
            r for group in _groups(answers, self.group_size) for r in majority_vote_rewards(group)
        ]


class CrossVote(Composite):
    """Co-Reward: agree with the majority answer to the *other* phrasing of the question.

    The column ``question_id`` joins the two phrasings: the batch holds each id's completions to
    the first phrasing and to the second, told apart by the column ``phrasing`` (0 or 1). An id
    with one phrasing in the batch is not scored.
    """

    def __init__(self, extract: Callable[[str], str | None], name: str = "cross_vote"):
        super().__init__(name, [], ["question_id", "phrasing"])
        self.extract = extract
        self.range = (0.0, 1.0)

    def __call__(self, prompts, completions, *, question_id, phrasing, **columns):
        """Votes across the phrasings of each question."""
        answers = [self.extract(completion_text(c)) for c in completions]
        sides: dict[Any, tuple[list[int], list[int]]] = {}
        for row, (question, side) in enumerate(zip(question_id, phrasing, strict=True)):
            sides.setdefault(question, ([], []))[int(side)].append(row)
        rewards: list[float | None] = [None] * len(completions)
        for first, second in sides.values():
            if not first or not second:
                continue
            votes = cross_vote_rewards([answers[i] for i in first], [answers[i] for i in second])
            for rows, values in zip((first, second), votes, strict=True):
                for i, value in zip(rows, values, strict=True):
                    rewards[i] = value
        return rewards


class Trust(Composite):
    """SophiaVL-R1: outcome + gamma alpha exp(-step / T) thinking, gamma from the group."""

    def __init__(
        self,
        outcome: Callable,
        thinking: Callable,
        group_size: int,
        *,
        alpha: float = 0.3,
        total: int | None = None,
        compat: str = "fixed",
        name: str = "trust",
    ):
        super().__init__(name, [outcome, thinking])
        self.group_size, self.alpha, self.total, self.compat = group_size, alpha, total, compat

    def __call__(self, prompts, completions, *, trainer_state=None, **columns):
        """Rewards of whole groups; a row without outcome or thinking score is not scored."""
        step, steps = _progress(trainer_state)
        outcome, thinking = (
            part(prompts=prompts, completions=completions, trainer_state=trainer_state, **columns)
            for part in self.parts
        )
        rewards: list[float | None] = []
        for pairs in _groups(list(zip(outcome, thinking, strict=True)), self.group_size):
            known = [i for i, pair in enumerate(pairs) if None not in pair]
            group: list[float | None] = [None] * len(pairs)
            if known:
                values = torch.tensor([pairs[i] for i in known], dtype=torch.float64)
                trusted = trust_weighted_rewards(
                    values[:, 0],
                    values[:, 1],
                    step=step,
                    total=self.total or steps,
                    alpha=self.alpha,
                    compat=self.compat,
                )
                for i, reward in zip(known, trusted.rewards.tolist(), strict=True):
                    group[i] = reward
            rewards += group
        return rewards


class StepRefined(Composite):
    """Outcome + coefficient times refined step rewards ("On Designing Effective RL Reward").

    ``score_steps(text, row) -> list of step rewards``, the answer step last. Delta
    r_k - r_{k+1} after Clip min(r_k - eta, 0); either can be turned off.
    """

    def __init__(
        self,
        outcome: Callable,
        score_steps: Callable[[str, dict[str, Any]], Sequence[float]],
        *,
        coefficient: float = 1.0,
        eta: float | None = 0.0,
        delta: bool = True,
        name: str = "step_refined",
    ):
        super().__init__(name, [outcome])
        self.score_steps, self.coefficient = score_steps, coefficient
        self.eta, self.delta = eta, delta

    def __call__(self, prompts, completions, **columns):
        """The outcome plus the sum of the refined step rewards."""
        outcome = self.parts[0](prompts=prompts, completions=completions, **columns)
        columns = row_columns(columns, len(completions))
        rewards = []
        for i, (value, completion) in enumerate(zip(outcome, completions, strict=True)):
            steps = self.score_steps(completion_text(completion), row_of(columns, i))
            steps = torch.tensor(steps).double()
            if self.eta is not None:
                steps = clip_step_rewards(steps, self.eta)
            if self.delta:
                steps = delta_step_rewards(steps)
            rewards.append(None if value is None else value + self.coefficient * steps.sum().item())
        return rewards


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]


def _groups(rows: list, size: int) -> list[list]:
    if len(rows) % size:
        raise InputError(f"group_size: {len(rows)} completions are not whole groups of {size}")
    return [rows[i : i + size] for i in range(0, len(rows), size)]
