# SPDX-License-Identifier: Apache-2.0
"""The published code's recorded calls, as calls of our rewards and ops.

`ADAPTERS[(system, function)]` maps the inputs of a recorded case to its output with
compat="upstream"; `fixed` says what the repaired reward gives for the cases whose behaviour is a
quirk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastgrpo import rewards

Adapter = Callable[..., Any]
ADAPTERS: dict[tuple[str, str], Adapter] = {}


def adapter(system: str, *functions: str):
    """Register the decorated function for recorded calls of `functions` of `system`."""

    def register(call: Adapter) -> Adapter:
        ADAPTERS.update({(system, function): call for function in functions})
        return call

    return register


def one(
    name: str, completion: str, compat: str = "upstream", params: dict | None = None, **columns
):
    """The reward of one completion."""
    function = rewards.get(name, compat=compat, **(params or {}))
    return function(None, [completion], **{key: [value] for key, value in columns.items()})[0]


def fenced(items: Any) -> str:
    """The items as a fenced block of JSON."""
    return f"```json\n{json.dumps(items)}\n```"


def answered(content: str) -> str:
    """The content as the answer of a completion that thinks first."""
    return f"<think>t</think><answer>{content}</answer>"
