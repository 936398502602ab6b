# SPDX-License-Identifier: Apache-2.0
"""Reads what a TRL run leaves in its output folder, and says what is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.errors import InputError

HELD_OUT_FILE = "heldout.json"
_NOT_REWARDS = {"step", "prompt", "completion", "advantage", "image_path", "solution"}


@dataclass
class Run:
    """What there is of a run.

    `history`: the trainer's log, one dict per logging step. `completions`: rows of the first and
    last completions file. `held_out`: {"before": {...}, "after": {...}} or None. `missing`: one
    sentence for each thing that is not there.
    """

    folder: Path
    history: list[dict[str, float]]
    completions: list[dict[str, Any]]
    reward_names: list[str]
    held_out: dict[str, dict[str, float]] | None
    missing: list[str] = field(default_factory=list)


def read_run(folder: Path | str) -> Run:
    """The run in `folder`.

    Raises InputError when it holds neither a trainer state nor completions, or a broken file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"run: expected the output folder of a training run, {folder} is not one")
    state, files = _latest_state(folder), sorted((folder / "completions").glob("*.parquet"))
    if state is None and not files:
        raise InputError(
            f"run: {folder} holds no trainer_state.json, in no checkpoint either, and no "
            "completions/*.parquet, so there is nothing to report"
        )
    run = Run(folder, _history(state), *_read_completions(files), _held_out(folder))
    run.missing = list(_missing(run, state))
    return run


def _latest_state(folder: Path) -> Path | None:
    """The trainer state of the whole run, else of the last checkpoint."""
    if (folder / "trainer_state.json").exists():
        return folder / "trainer_state.json"
    states = folder.glob("checkpoint-*/trainer_state.json")
    return max(states, key=lambda path: int(path.parent.name.split("-")[1]), default=None)


def _history(state: Path | None) -> list[dict[str, float]]:
    if state is None:
        return []
    # Evaluations and the entry that sums the run up carry no training reward.
    return [entry for entry in _json(state)["log_history"] if "reward" in entry]


def _read_completions(files: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    if not files:
        return [], []
    import pyarrow
    import pyarrow.parquet

    # Only the first and the last file are shown; a long run leaves thousands.
    rows = []
    for path in dict.fromkeys((files[0], files[-1])):
        try:
            rows += pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"run: {path} is no complete parquet file: {error}") from error
    columns = dict.fromkeys(name for row in rows for name in row if name not in _NOT_REWARDS)
    numeric = (int, float, type(None))
    return rows, [c for c in columns if all(isinstance(row.get(c), numeric) for row in rows)]


def _held_out(folder: Path) -> dict[str, dict[str, float]] | None:
    path = folder / HELD_OUT_FILE
    return _json(path) if path.exists() else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"run: {path} is not JSON: {error}") from error


def _missing(run: Run, state: Path | None):
    if state is None:
        yield (
            "No trainer_state.json, so no curves: it is written with each checkpoint and by "
            "trainer.save_state()."
        )
    elif not run.history:
        yield "The trainer's log holds no reward, so no curves: is this a GRPO run?"
    if not run.completions:
        yield "No completions/*.parquet, so no table: train with log_completions=True."
    elif "image_path" not in run.completions[0]:
        yield (
            "The completions name no image (TRL does not store them), so none is drawn: call "
            "fastgrpo.integrations.trl.record(trainer) before training on rows with an image_path."
        )
    if run.held_out is None:
        yield f"No {HELD_OUT_FILE}, so no held-out figures before and after."
    if run.history and not any(key.startswith("time/") for key in run.history[-1]):
        yield (
            "No step times by part: call fastgrpo.integrations.trl.record(trainer) before training."
        )
