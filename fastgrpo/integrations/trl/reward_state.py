# SPDX-License-Identifier: Apache-2.0
"""What reward functions keep between batches, in and out of a checkpoint's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from fastgrpo.errors import InputError


def save_state_into(
    folder: str | Path, names: Sequence[str], functions: Sequence[Callable], rank: int
) -> None:
    """Writes what `functions` keep, if anything; each process scores rows of its own."""
    state = _state(names, functions)
    if state:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(state, _file(folder, rank))


def load_state_from(
    folder: str | Path, names: Sequence[str], functions: Sequence[Callable], rank: int
) -> None:
    """Restores what `save_state_into` wrote; `InputError` where it does not fit the functions."""
    state, path = _state(names, functions), _file(folder, rank)
    if not state:
        return
    if not path.is_file():
        raise InputError(f"{path} is missing: what {sorted(state)} had kept cannot be restored")
    saved = torch.load(path, weights_only=True, map_location="cpu")
    if saved.keys() != state.keys():
        raise InputError(f"{path} keeps {sorted(saved)}, the rewards are {sorted(state)}")
    for key, kept in saved.items():
        functions[int(key.split(" ", 1)[0])].load_state_dict(kept)


def _state(names: Sequence[str], functions: Sequence[Callable]) -> dict[str, dict]:
    """`state_dict()` by position and name; a reward model TRL holds is not trained."""
    states = {
        f"{i} {name}": function.state_dict()
        for i, (name, function) in enumerate(zip(names, functions, strict=True))
        if not isinstance(function, nn.Module) and hasattr(function, "state_dict")
    }
    return {key: state for key, state in states.items() if state}


def _file(folder: str | Path, rank: int) -> Path:
    return Path(folder, f"reward_state_{rank}.pt")
