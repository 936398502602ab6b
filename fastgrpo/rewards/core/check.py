# SPDX-License-Identifier: Apache-2.0
"""Rewards asked about their own truth: a perfect answer must be paid the top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.registry import Reward
from fastgrpo.rewards.geometry.frames import FRAMES, UNSTATED, RowFrames
from fastgrpo.rewards.read.boxes import first_box
from fastgrpo.rewards.read.faults import TEXT_FAULTS, BadColumn

# How far a solution may reach beyond its image, and a value below the top: rounding of the data.
BEYOND, BELOW = 0.02, 1e-6
# Location tokens are whole numbers, so that even a perfect one overlaps a small box in part.
BELOW_LOCATIONS = 0.25


class Verdict(NamedTuple):
    """What one reward paid the answer made from one row.

    `fault` None: its top. `doubt`: what is odd about the solution in the frame it is said to be in.
    """

    reward: str
    row: int
    answer: str | None
    value: float | None
    fault: str | None
    frames: str
    doubt: str | None = None


def parts_of(function: Callable) -> Iterator[Callable]:
    """The rewards inside a reward made of others, itself where it is made of none."""
    parts = getattr(function, "parts", ())
    for part in parts:
        yield from parts_of(part)
    if not parts:
        yield function


def has_truth(function: Callable) -> bool:
    """Whether an answer can be made for a reward: one of ours, repaired, with a maker."""
    return isinstance(function, Reward) and function.compat == "fixed" and function.makes_truth


def refuse_unstated(function: Callable, columns: dict[str, Sequence[Any]], size: int) -> None:
    """`InputError` where a reward compares boxes and nobody says which frame the answers are in."""
    if not isinstance(function, Reward) or not function.framed:
        return
    if any(row.answer == UNSTATED for row in function.frames_of(columns, size)):
        raise InputError(
            f"reward {function.name!r} compares boxes or points, and the model's family states no "
            "frame for them: say which one the prompt asks for by answer_frame (a data column, or "
            f"a setting of the reward), one of {', '.join(FRAMES)}"
        )


def check_truth(
    function: Reward, columns: dict[str, Sequence[Any]], rows: Sequence[int], **run: Any
) -> list[Verdict]:
    """Verdicts of a reward (see `has_truth`) on the answers made from the given rows of a batch.

    An answer is written as the column `answer_frame` says that this row's prompt asks for, as the
    reward's own format prescribes, or as the model's family writes (`model_frame`); it is read as
    the reward's settings say. A row that is not scored has value None and its reason.
    """
    size = len(next(iter(columns.values())))
    columns = {k: v for k, v in columns.items() if v is not None and len(v) == size}
    read = function.frames_of(columns, size)
    return [
        _verdict(function, {k: v[i] for k, v in columns.items()}, read[i], i, run) for i in rows
    ]


def _verdict(function: Reward, row: dict[str, Any], read: RowFrames, i: int, run: dict) -> Verdict:
    written = row.get("answer_frame") or function.prescribed_frame or row.get("model_frame")
    if written in (None, UNSTATED):
        written = read.answer
    written = RowFrames(written, read.solution, read.row)
    used = f"written as {written.answer!r}, read as {read.answer!r}, solution {read.solution!r}"
    try:
        answer = function.truth(row, written)
        doubt = _doubt(answer, written) if function.framed else None
        used += f", (image, seen) sizes {read.sizes}" if read.row else ""
    except TEXT_FAULTS as fault:
        return Verdict(function.name, i, None, None, f"no answer could be made: {fault}", used)
    prompts = [row.get("prompt")]
    given = {key: [value] for key, value in row.items() if key not in ("prompt", "completions")}
    (value,) = function(prompts, [answer], **given, **run)
    top = function.range[1]
    if value is None:
        fault = "the row is not scored"
    elif value < top - (BELOW_LOCATIONS * top if written.answer == "locations" else BELOW):
        fault = f"the answer made from the solution is paid {value:.4g}, its top is {top:.4g}"
    else:
        fault = None
    return Verdict(function.name, i, answer, value, fault, used, doubt)


def _doubt(answer: str, written: RowFrames) -> str | None:
    """What is odd about the first box of a solution in the frame it is said to be in."""
    box = first_box(answer)
    if box is None or not written.stated:
        return None
    try:
        corners = np.asarray(written.answer_in("unit", box))
        if corners.max() > 1 + BEYOND or corners.min() < -BEYOND:
            return f"the solution lies outside its image: {corners.round(3).tolist()} of its sides"
        if written.solution != "unit" and max(written.answer_in(written.solution, box)) <= 1:
            return f"the solution has no coordinate above 1 in frame {written.solution!r}"
    except BadColumn:
        return None
    return None
