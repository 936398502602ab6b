# SPDX-License-Identifier: Apache-2.0
"""A published system as a file: rewards, advantage rule, objective, settings, and what is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import yaml

from fastgrpo import environments
from fastgrpo.advantages.perception_rule import PerceptionRule
from fastgrpo.advantages.rule import AdvantageRule, GroupFilter
from fastgrpo.errors import InputError

_FOLDER = resources.files("fastgrpo.recipes")


@dataclass(frozen=True)
class Recipe:
    """One system of the field.

    `rewards` are specifications for `recipes.rewards.build_reward`, each with a `weight`;
    `advantages` and `perception` fields of `AdvantageRule` and `PerceptionRule`; `config` defaults
    of `fastgrpo train` (TRL's GRPOConfig and ours). `exact` and `reading` say in prose what equals
    the published code and what is this project's reading of the paper or its abstract; `needs`
    names what a user must bring (a judge's address, a reward model, data columns). `environment`,
    a `name` with its settings, makes rows of several turns. `example` shows one row's `columns`, a
    `good` and a `bad` completion, and with an environment the `calls` (tool and arguments) that
    come before the good one.
    """

    name: str
    system: str
    source: str
    exact: str
    reading: str
    rewards: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]
    needs: str = ""
    advantages: AdvantageRule | None = None
    perception: PerceptionRule | None = None
    environment: Mapping[str, Any] | None = None
    example: Mapping[str, Any] = field(default_factory=dict)

    @property
    def environment_factory(self) -> Callable[[], environments.Environment] | None:
        """What TRL's argument of that name takes; None for rows of one turn."""
        return None if self.environment is None else environments.get(**self.environment)

    @property
    def weights(self) -> list[float]:
        """The weight of each reward, 1 where none is given."""
        return [float(r.get("weight", 1.0)) for r in self.rewards]


def names() -> list[str]:
    """The recipes that ship with the package."""
    files = (f.name for f in _FOLDER.iterdir())
    return sorted(f.removesuffix(".yaml") for f in files if f.endswith(".yaml"))


def load(name: str) -> Recipe:
    """The recipe called `name`; `InputError` for an unknown one or a malformed file."""
    if name not in names():
        raise InputError(f"recipe: no {name!r}; there are {', '.join(names())}")
    return parse(name, yaml.safe_load(_FOLDER.joinpath(f"{name}.yaml").read_text("utf-8")))


def parse(name: str, data: Any) -> Recipe:
    """A recipe from a mapping, as in its YAML file."""
    if not isinstance(data, Mapping):
        raise InputError(f"{name}: expected a mapping, got {type(data).__name__}")
    known = {f.name for f in fields(Recipe)} - {"name"}
    required = known - {"needs", "advantages", "perception", "environment"}
    unknown, missing = sorted(set(data) - known), sorted(required - set(data))
    if unknown or missing:
        raise InputError(f"{name}: unknown fields {unknown}, missing fields {missing}")
    if not data["rewards"]:
        raise InputError(f"{name}: rewards: a recipe needs at least one")
    values = dict(data)
    values["rewards"] = tuple(data["rewards"])
    values["advantages"] = _rule(data.get("advantages"))
    perception = data.get("perception")
    values["perception"] = PerceptionRule(**perception) if perception else None
    return Recipe(name=name, **values)


def _rule(data: Mapping[str, Any] | None) -> AdvantageRule | None:
    if data is None:
        return None
    filters: Sequence[Mapping] = data.get("filters", ())
    return AdvantageRule(
        **{k: v for k, v in data.items() if k != "filters"},
        filters=tuple(GroupFilter(**f) for f in filters),
    )
