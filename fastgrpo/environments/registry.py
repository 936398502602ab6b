# SPDX-License-Identifier: Apache-2.0
"""Environments by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pkgutil import iter_modules

from fastgrpo import environments
from fastgrpo.environments.environment import Environment
from fastgrpo.errors import InputError


@cache
def _classes() -> dict[str, type[Environment]]:
    found = {}
    for module in iter_modules(environments.__path__):
        kind = getattr(import_module(f"{environments.__name__}.{module.name}"), "ENVIRONMENT", None)
        if kind is not None:
            found[module.name] = kind
    return found


def names() -> list[str]:
    """All environments, sorted."""
    return sorted(_classes())


def get(name: str, **settings) -> Callable[[], Environment]:
    """A factory of the environment called `name`, as TRL's `environment_factory` takes it.

    `settings` are the class's own, `max_calls` among them. Raises `InputError` for an unknown name
    or setting.
    """
    if name not in _classes():
        raise InputError(f"environment: no {name!r}; there are {', '.join(names())}")
    kind = _classes()[name]
    known = list(inspect.signature(kind).parameters)
    for setting in settings:
        if setting not in known:
            raise InputError(f"environment {name}: no setting {setting!r}; it has {known}")
    return partial(kind, **settings)
