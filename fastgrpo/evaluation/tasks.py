# SPDX-License-Identifier: Apache-2.0
"""What is measured: how an answer is read, what it is worth, and the figures over all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastgrpo import rewards
from fastgrpo.errors import InputError
from fastgrpo.evaluation import vlm_r1_scripts
from fastgrpo.evaluation.detection import figures as detection_figures
from fastgrpo.evaluation.detection import read_answer, row_precisions
from fastgrpo.rewards.geometry.frames import SETTINGS, RowFrames, row_frames
from fastgrpo.rewards.geometry.overlap import iou
from fastgrpo.rewards.read.boxes import first_box, ordered_box
from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.items import Detections, solution_detections
from fastgrpo.rewards.read.tags import answer_or_all
from fastgrpo.rewards.systems.vlm_r1 import solution_box

Row = Mapping[str, Any]
AT = 0.5


@dataclass(frozen=True)
class Scored:
    """What one answer is worth.

    `value` is in [0, 1], None for a row that counts nowhere; `fault` says why, or what is wrong
    with an answer that counts as 0. `truth` and `said` are boxes in pixels of the upright image,
    empty where there are none or a size is not known. `found` is what a task keeps for `figures`.
    """

    value: float | None
    fault: str | None = None
    truth: list = field(default_factory=list)
    said: list = field(default_factory=list)
    found: Any = None


@dataclass(frozen=True)
class Task:
    """`score(rows, texts, frames)` gives one `Scored` a row, `figures(scored)` the figures of all
    rows that count; `orders` names the figure by which checkpoints are compared.
    """

    name: str
    score: Callable[[Sequence[Row], Sequence[str], Sequence[RowFrames]], list[Scored]]
    figures: Callable[[Sequence[Scored]], dict[str, float]]
    orders: str

    def __call__(self, rows: Sequence[Row], texts: Sequence[str], **frames: str | None):
        """(scores, figures); `frames`: `answer_frame` and `solution_frame` where the rows state
        none. Raises `InputError` when no row counts.
        """
        unknown = set(frames) - set(SETTINGS)
        if unknown:
            raise InputError(f"{unknown.pop()}: expected one of {', '.join(SETTINGS)}")
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(
            name for row in rows for name in row)}  # fmt: skip
        columns["prompts"] = [row.get("prompt") for row in rows]  # may name one of several images
        scored = self.score(rows, texts, row_frames(columns, len(rows), frames, texts))
        counted = [one for one in scored if one.value is not None]
        if not counted:
            first = next((one.fault for one in scored), "there is none")
            raise InputError(f"task: no row can be scored for {self.name!r}; the first: {first}")
        return scored, {"rows": len(counted), "not_scored": len(scored) - len(counted)} | (
            self.figures(counted)
        )


def score_grounding(rows, texts, frames) -> list[Scored]:
    """IoU of the first box of the answer (of the text without `<answer>`) and the solution's."""
    return [_box(*one) for one in zip(rows, texts, frames, strict=True)]


def _box(row: Row, text: str, frame: RowFrames) -> Scored:
    try:
        truth = solution_box(row.get("solution"))
        said = first_box(answer_or_all(text))
        drawn = _drawn(frame, [truth], [] if said is None else [said])
        if said is None:
            return Scored(0.0, "no box", *drawn)
        said = frame.to_solution(said)
    except BadColumn as fault:
        return Scored(None, str(fault))
    if not ordered_box(said):
        return Scored(0.0, "reversed box", *drawn)
    return Scored(iou(said, truth), None, *drawn)


def _drawn(frame: RowFrames, truth: Any, said: Any) -> tuple[list, list]:
    """Both in pixels of the image; nothing where its size, or the one seen, is not known."""
    try:
        return (
            [list(map(float, frame.solution_in("image", list(box)))) for box in truth],
            [list(map(float, frame.answer_in("image", list(box)))) for box in said],
        )
    except BadColumn:
        return [], []


def grounding_figures(scored: Sequence[Scored]) -> dict[str, float]:
    values = [one.value for one in scored]
    return {
        "accuracy": _mean([value >= AT for value in values]),
        "mean_iou": _mean(values),
        "no_box": sum(one.fault == "no box" for one in scored),
    }


def score_detection(rows, texts, frames) -> list[Scored]:
    """A row's own value is the average precision of its image alone."""
    scored: list[Scored | None] = [None] * len(texts)
    kept = []
    for i, (row, text, frame) in enumerate(zip(rows, texts, frames, strict=True)):
        try:
            truth = solution_detections(row.get("solution"))
            said, scores, fault = _detections(text)
            given = Detections(np.asarray(frame.to_solution(said.boxes)), said.labels)
        except BadColumn as reason:
            scored[i] = Scored(None, str(reason))
            continue
        drawn = _drawn(frame, truth.boxes.tolist(), _usable(said.boxes))
        kept.append((i, fault, drawn, (given, scores, truth)))
    values = row_precisions([found for *_, found in kept])
    for (i, fault, drawn, found), value in zip(kept, values, strict=True):
        scored[i] = Scored(value, fault, *drawn, found=found)
    return scored


def _detections(text: str) -> tuple[Detections, list[float], str | None]:
    try:
        return *read_answer(text), None
    except Unscorable as reason:
        return Detections(np.empty((0, 4)), []), [], str(reason)


def _usable(boxes: np.ndarray) -> list[list[float]]:
    return boxes[np.isfinite(boxes).all(1)].tolist()


def _rewarded(name: str) -> Callable:
    """Each row's value is what a reward of `fastgrpo.rewards` pays its answer."""

    def score(rows, texts, frames) -> list[Scored]:
        reward = rewards.get(name)
        given = dict.fromkeys(key for key in (*reward.columns, *reward.optional))
        columns = {key: [row.get(key) for row in rows] for key in given}
        columns = {key: column for key, column in columns.items() if key in reward.columns
                   or any(value is not None for value in column)}  # fmt: skip
        values = reward(completions=list(texts), **columns)
        return [
            Scored(value, None if value is not None else f"{name} does not score the row")
            for value in values
        ]

    return score


def _accuracy(scored: Sequence[Scored]) -> dict[str, float]:
    return {"accuracy": _mean([one.value for one in scored])}


def _script(name: str) -> Task:
    def score(rows, texts, frames) -> list[Scored]:
        return [_by_script(name, *one) for one in zip(rows, texts, frames, strict=True)]

    return Task(f"vlm_r1/{name}", score, _accuracy, "accuracy")


def _by_script(name: str, row: Row, text: str, frame: RowFrames) -> Scored:
    try:
        truth = solution_box(row.get("solution"))
        (image, seen), *_ = frame.sizes
        box, overlap = vlm_r1_scripts.SCRIPTS[name](text, truth, image, seen)
    except (BadColumn, ZeroDivisionError) as fault:
        return Scored(None, str(fault) or "two empty boxes: the script divides by zero here")
    return Scored(float(overlap > AT), None, [list(map(float, truth))], [box], found=overlap)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


TASKS = {
    "rec": Task("rec", score_grounding, grounding_figures, "accuracy"),
    "detection": Task(
        "detection",
        score_detection,
        lambda scored: (
            detection_figures([one.found for one in scored])
            | {"unreadable": sum(one.fault is not None for one in scored)}
        ),
        "mAP",
    ),
    "choice": Task("choice", _rewarded("vlm_r1/mcq"), _accuracy, "accuracy"),
    "math": Task("math", _rewarded("vlm_r1/math"), _accuracy, "accuracy"),
    **{f"vlm_r1/{name}": _script(name) for name in vlm_r1_scripts.SCRIPTS},
}


def task(name: str) -> Task:
    """A task by its name, or the mean of a reward of `fastgrpo.rewards`.

    "rec": accuracy at IoU >= 0.5 and mean IoU, boxes converted from the frame of the answer to the
    solution's. "detection": COCO's mAP, AP50 and AP75 over all images. "choice", "math": the share
    of answers that `vlm_r1/mcq` and `vlm_r1/math` pay. "vlm_r1/test_rec_r1" and the like: the
    accuracy VLM-R1's evaluation script of that name prints (see `vlm_r1_scripts`), as a share.
    """
    if name in TASKS:
        return TASKS[name]
    if name in rewards.names():
        return Task(name, _rewarded(name), lambda scored: {"mean": _accuracy(scored)["accuracy"]},
                    "mean")  # fmt: skip
    raise InputError(
        f"task: expected one of {', '.join(TASKS)} or a name of fastgrpo.rewards, got {name!r}"
    )
