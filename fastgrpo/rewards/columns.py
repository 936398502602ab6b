"""The data columns a trainer hands to a reward function."""

from __future__ import annotations

from typing import Any


def row_columns(columns: dict[str, Any], size: int) -> dict[str, list | tuple]:
    """The columns that hold one value per completion; what is left belongs to the whole batch."""
    return {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == size}


def row_of(columns: dict[str, list | tuple], index: int) -> dict[str, Any]:
    """One completion's values."""
    return {name: values[index] for name, values in columns.items()}
