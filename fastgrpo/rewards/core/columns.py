# SPDX-License-Identifier: Apache-2.0
"""The data columns a trainer hands to a reward function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def row_columns(columns: dict[str, Any], size: int) -> dict[str, list | tuple]:
    """The columns that hold one value per completion; what is left belongs to the whole batch."""
    return {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == size}


def row_of(columns: dict[str, list | tuple], index: int) -> dict[str, Any]:
    """One completion's values."""
    return {name: values[index] for name, values in columns.items()}


def progress(
    trainer_state: Any, step: int | None = None, total_steps: int | None = None
) -> tuple[int | None, int | None]:
    """(step, total steps) from explicit settings or else from the trainer's state."""
    if trainer_state is not None:
        step = trainer_state.global_step if step is None else step
        total_steps = trainer_state.max_steps if total_steps is None else total_steps
    return step, total_steps


def group_numbers(prompts: Sequence[Any] | None, size: int) -> np.ndarray:
    """(size,) group number of each completion: neighbours with equal prompts share a group."""
    if prompts is None:
        return np.zeros(size, dtype=np.int64)
    new = [i > 0 and prompts[i] != prompts[i - 1] for i in range(size)]
    return np.cumsum(new, dtype=np.int64)
