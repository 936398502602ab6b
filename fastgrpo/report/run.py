# SPDX-License-Identifier: Apache-2.0
"""Reads what a TRL run leaves in its output folder, and says what is missing."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.errors import InputError

HELD_OUT_FILE, RUN_LOG = "heldout.json", "log.jsonl"
_NOT_REWARDS = {"step", "prompt", "completion", "advantage", "image_path", "solution", "frames"}


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
    log = folder / RUN_LOG
    if state is None and not files and not log.exists():
        raise InputError(
            f"run: {folder} holds no trainer_state.json, in no checkpoint either, no {RUN_LOG} and "
            "no completions/*.parquet, so there is nothing to report"
        )
    files, broken = _readable(files)
    history = _newest(_history(state), _lines(log))
    run = Run(folder, history, *_read_completions(files), _held_out(folder))
    run.missing = [*broken, *_missing(run, state)]
    return run


def _latest_state(folder: Path) -> Path | None:
    """The trainer state of the whole run, else of the last checkpoint."""
    if (folder / "trainer_state.json").exists():
        return folder / "trainer_state.json"
    states = folder.glob("checkpoint-*/trainer_state.json")
    return max(states, key=lambda path: int(path.parent.name.split("-")[1]), default=None)


def _lines(log: Path) -> list[dict[str, float]]:
    """The entries a run has logged so far; a line that is not finished yet is left out."""
    text = log.read_text() if log.exists() else ""
    entries = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"run: {log} is not JSON: {error}") from error
    return [entry for entry in entries if "reward" in entry]


def _newest(*histories: list[dict[str, float]]) -> list[dict[str, float]]:
    """The history that reaches furthest: a run that goes on is ahead of its last checkpoint."""
    return max(histories, key=lambda history: history[-1]["step"] if history else -1)


def _history(state: Path | None) -> list[dict[str, float]]:
    if state is None:
        return []
    # Evaluations and the entry that sums the run up carry no training reward.
    return [entry for entry in _json(state)["log_history"] if "reward" in entry]


def _readable(files: list[Path]) -> tuple[list[Path], list[str]]:
    """The files up to the last one that is whole; a sentence for each that is not.

    The last file of a run that goes on may be under the pen.
    """
    if not files:
        return [], []
    if importlib.util.find_spec("pyarrow") is None:
        return [], ["No table: pyarrow is not installed (pip install 'fastgrpo[report]')."]
    import pyarrow.parquet

    said = []
    while files:
        try:
            for path in (files[0], files[-1]):
                pyarrow.parquet.read_metadata(path)
            break
        except pyarrow.ArrowInvalid:
            said.append(
                f"completions/{path.name} is no complete parquet file (a run still going?)."
            )
            files = [file for file in files if file != path]
    return files, said


def _read_completions(files: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    if not files:
        return [], []
    import pyarrow.parquet

    # Only the first and the last file are shown; a long run leaves thousands.
    rows = []
    for path in dict.fromkeys((files[0], files[-1])):
        rows += pyarrow.parquet.read_table(path).to_pylist()
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
    if state is None and not run.history:
        yield (
            f"No trainer_state.json and no {RUN_LOG}, so no curves: the one is written with each "
            "checkpoint and by trainer.save_state(), the other by `record(trainer)`."
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
