# SPDX-License-Identifier: Apache-2.0
"""Vision-R1's criterion-driven rewards (jefferyZhan/Griffon@9866875): precision, recall, format."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from fastgrpo.rewards.core.columns import progress
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import answer_box
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.geometry.matching import folded, match, overlaps
from fastgrpo.rewards.read.boxes import ordered_box
from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.items import MAX_BOXES, MAX_JSON, Detections, loads
from fastgrpo.rewards.read.tags import fenced_json, last_answer, pattern

SOURCE = "jefferyZhan/Griffon@9866875"
STAGE_STEP = 1500
MAX_LOOSE = 100  # boxes read by their pattern where the text is no JSON
_OPTIONAL = (
    "target_id_maps", "num_instances", "width", "height", "input_widths", "input_heights",
)  # fmt: skip


def _truth(*, solution, frames, width=None, height=None, input_widths=None, input_heights=None,
           **columns) -> str:  # fmt: skip
    frames = _as_input(frames, width, height, input_widths, input_heights)
    truth = read_solution(solution)
    pairs = zip(truth.boxes.tolist(), truth.labels, strict=True)
    return json.dumps([{"bbox_2d": answer_box(b, frames), "label": name} for b, name in pairs])


@reward("vision_r1/precision", columns=("solution",), optional=_OPTIONAL, source=SOURCE,
        batched=True, framed=True, truth=_truth)  # fmt: skip
def precision(
    texts,
    note,
    *,
    solution,
    frames,
    num_instances=None,
    width=None,
    height=None,
    input_widths=None,
    input_heights=None,
    step: int | None = None,
    adaptive: bool = False,
    trainer_state=None,
):
    """Mean of f(GIoU) over the matched pairs; f is 0 below `low`, 1 above `high`, else GIoU.

    The answer is a JSON list of {"bbox_2d", "label"}, the solution a list of [label, box]. Pairs
    are an optimal assignment of the cost L1 distance in pixels - [equal label] - GIoU. (low, high)
    is (0.5, 0.75) before step 1500 and (0.75, 0.9) from it; without a step (`adaptive=False`, the
    released setting) GIoU counts as it is, negative values as 0. A row with `input_widths`,
    `input_heights`, `width` and `height` answers in pixels seen unless another frame is stated.
    An answer without boxes gives 1 where `num_instances` (default: boxes of the solution) is 0,
    else 0.

    Source: jefferyZhan/Griffon@9866875, `precision_reward`. "upstream": extra boxes cost nothing
    and wrong labels cost nothing. "fixed": the sum is divided by the number of predicted boxes,
    and a pair with unequal labels counts 0.
    """
    low, high = precision_bounds(stage_step(step, adaptive, trainer_state))
    inputs = (width, height, input_widths, input_heights)
    values, rows = _matched(texts, note, solution, frames, num_instances, inputs)
    for i, row in rows.items():
        kept = np.where(row.same_label, gate(row.giou, low, high), 0.0)
        values[i] = float(kept.sum() / row.num_pred)
    return values


@reward("vision_r1/recall", columns=("solution",), optional=_OPTIONAL, source=SOURCE, batched=True,
        framed=True, truth=_truth)  # fmt: skip
def recall(
    texts,
    note,
    *,
    solution,
    frames,
    num_instances=None,
    width=None,
    height=None,
    input_widths=None,
    input_heights=None,
    step: int | None = None,
    adaptive: bool = False,
    trainer_state=None,
):
    """(Pairs with GIoU above a bound) / `num_instances`; pairs as in `vision_r1/precision`.

    The bound is 0.5, from step 1500 0.75. With a step (`adaptive=True`) a recall below 0.5 counts
    0 and above 0.75 counts 1.

    Source: jefferyZhan/Griffon@9866875, `recall_reward`. "upstream": a GIoU of exactly the bound
    counts by its value, wrong labels count. "fixed": the bound itself counts as reached, equal
    labels only.
    """
    step = stage_step(step, adaptive, trainer_state)
    inputs = (width, height, input_widths, input_heights)
    values, rows = _matched(texts, note, solution, frames, num_instances, inputs)
    for i, row in rows.items():
        reached = (row.giou >= recall_bound(step)) & row.same_label
        values[i] = staged(float(reached.sum() / max(row.num_instances, 1)), step)
    return values


@reward("vision_r1/format", optional=("num_instances",), source=SOURCE)
def dual_format(text: str, *, num_instances: int | None = None) -> float:
    """1 when the text is JSON whose items have a box of four; 1 minus that without instances.

    Source: jefferyZhan/Griffon@9866875, `dual_format_reward`. "upstream": any JSON will do (items
    without box or label are not looked at). "fixed": a list in which every item has an ordered
    box of four numbers and a label; without instances an empty list or "None" gives 1.
    """
    text = without_fences(text)
    if num_instances is not None and num_instances <= 0:
        return float(text.lower() in ("[]", "none", ""))
    items = loads(text)
    return float(bool(isinstance(items, list) and items and all(map(_is_item, items))))


def without_fences(text: str) -> str:
    """The text without the marks of a fenced block."""
    return text.replace("```json\n", "").replace("\n```", "").strip()


def _is_item(item: Any) -> bool:
    known = isinstance(item, dict) and isinstance(item.get("label"), str)
    return known and ordered_box(item.get("bbox_2d"))


def stage_step(step: int | None, adaptive: bool, trainer_state) -> int | None:
    """The step that decides the stage: the setting, or with `adaptive` the trainer's."""
    return step if step is not None or not adaptive else progress(trainer_state)[0]


def precision_bounds(step: int | None) -> tuple[float, float]:
    """(low, high) of a step."""
    return (0.0, 1.0) if step is None else (0.5, 0.75) if step < STAGE_STEP else (0.75, 0.9)


def recall_bound(step: int | None) -> float:
    """The GIoU that counts as found at a step."""
    return 0.5 if step is None or step < STAGE_STEP else 0.75


def staged(value: float, step: int | None) -> float:
    """With a step, a recall below 0.5 is 0 and above 0.75 is 1."""
    if step is None:
        return value
    return 0.0 if value < 0.5 else 1.0 if value > 0.75 else value


def gate(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, float32."""
    return np.where(values < low, 0.0, np.where(values > high, 1.0, values)).astype(np.float32)


class Row(NamedTuple):
    """The matched pairs of one row: GIoU and whether labels are equal."""

    giou: np.ndarray
    same_label: np.ndarray
    num_pred: int
    num_instances: int


def match_rows(said: list[Detections], truths: list[Detections], instances: list[int]) -> list[Row]:
    """The optimal assignment of each row, all in one call."""
    pairs = overlaps(said, truths, kind="giou", same=folded)
    distances = [
        np.abs(p.boxes[:, None] - g.boxes[None]).sum(-1).ravel()
        for p, g in zip(said, truths, strict=True)
    ]
    near = -np.concatenate(distances) if distances else np.empty(0)
    scores = pairs._replace(iou=near + pairs.same_label + pairs.iou)
    found = match(scores, method="optimal", same_label=False)
    place = pairs.offsets.numpy()[found.row] + found.pred * pairs.gt_sizes[found.row] + found.gt
    rows = []
    for k, (one, count) in enumerate(zip(said, instances, strict=True)):
        mine = place[found.row == k]
        rows.append(Row(pairs.iou[mine], pairs.same_label[mine], len(one.labels), count))
    return rows


def _matched(texts, note, solutions, frames, num_instances, inputs):
    """Values of the rows that are settled, and the matched pairs of the others by row."""
    values: list[float | None] = [0.0] * len(texts)
    said, truths, order, counts = [], [], [], []
    for i, text in enumerate(texts):
        try:
            truth = read_solution(solutions[i])
            frame = _as_input(frames[i], *(side and side[i] for side in inputs))
            found = _read(text.strip())
            boxes, wanted = _pixels(frame, found.boxes, truth.boxes)
        except BadColumn as fault:
            note(i, f"bad_column: {fault}")
            values[i] = None
            continue
        except Unscorable as fault:
            note(i, str(fault))
            continue
        count = num_instances[i] if num_instances is not None else None
        count = len(truth.labels) if count is None else count
        if not found.labels:
            values[i] = float(count <= 0)
        elif truth.labels:
            said.append(Detections(boxes, found.labels))
            truths.append(Detections(wanted, truth.labels))
            order.append(i)
            counts.append(count)
    return values, dict(zip(order, match_rows(said, truths, counts), strict=True))


def _as_input(frame: RowFrames, width, height, input_width, input_height) -> RowFrames:
    """The row as answered in pixels of its input size, unless the frame is stated."""
    if frame.stated or None in (width, height, input_width, input_height):
        return frame
    sizes = {"image_size": (width, height), "seen_sizes": (input_width, input_height)}
    return RowFrames("seen", frame.solution, frame.row | sizes)


def _pixels(frame: RowFrames, said: np.ndarray, truth: np.ndarray):
    """Both sides in pixels of the image, which the L1 distance is in; as given in one frame."""
    if frame.answer == frame.solution:
        return said, truth
    return frame.answer_in("image", said), frame.solution_in("image", truth)


def read_solution(solution: Any) -> Detections:
    """[[label, box], ...] as a list or JSON."""
    try:
        pairs = json.loads(solution) if isinstance(solution, str) else list(solution)
        boxes = np.array([box for _, box in pairs], dtype=np.float64).reshape(-1, 4)
        return Detections(boxes, [label.lower() for label, _ in pairs])
    except (TypeError, ValueError, AttributeError) as fault:
        raise BadColumn(f"solution: {fault}") from None


_ITEM = (
    r'\{"bbox_2d": \[(\d{1,3}|1000), (\d{1,3}|1000), (\d{1,3}|1000), (\d{1,3}|1000)\], '
    r'"label": "([^"]+)"\}'
)


def _read(text: str) -> Detections:
    text = last_answer(text).strip()
    fenced = fenced_json(text, last=True)
    return read_answer(text if fenced is None else fenced.strip(), float, MAX_BOXES, MAX_LOOSE)


def read_answer(text: str, number, max_items: int | None, max_loose: int | None) -> Detections:
    """Boxes with x1 < x2 and y1 < y2 from JSON or else from its pattern, each `number` of it."""
    if len(text) > MAX_JSON:
        raise Unscorable("text_too_long")
    items = _json_items(text)
    if max_items is not None and len(items) > max_items:
        raise Unscorable("too_many_boxes")
    boxes, labels = [], []
    for item in items:
        box, label = (
            (item.get(k) for k in ("bbox_2d", "label")) if isinstance(item, dict) else (0, 0)
        )
        try:
            corners = [number(v) for v in box] if isinstance(box, list) and len(box) == 4 else None
        except (TypeError, ValueError, OverflowError):
            continue
        if corners and corners[0] < corners[2] and corners[1] < corners[3]:
            if max(map(abs, corners)) < 1e9:
                boxes.append(corners)
                labels.append(label if isinstance(label, str) else None)
    if not boxes:
        for found in islice(pattern(_ITEM).finditer(text), max_loose):
            corners = [int(v) for v in found.groups()[:4]]
            if corners[0] < corners[2] and corners[1] < corners[3]:
                boxes.append(corners)
                labels.append(found.group(5))
    return Detections(np.array(boxes, dtype=np.float64).reshape(-1, 4), labels)


def _json_items(text: str) -> list[Any]:
    lines = text.splitlines()
    if lines and lines[0].startswith("```json"):
        text = "\n".join(lines[1:])
    try:
        items = json.loads(text.split("```")[0])
    except (ValueError, RecursionError):
        return []
    return items if isinstance(items, list) else []
