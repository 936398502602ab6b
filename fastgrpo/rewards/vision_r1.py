"""Vision-R1's criterion-driven rewards (jefferyZhan/Griffon@9866875): precision, recall, format."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np

from fastgrpo.rewards.boxes import ordered_box
from fastgrpo.rewards.detection import MAX_BOXES, Detections, match, overlaps
from fastgrpo.rewards.registry import BadColumn, Unscorable, progress, reward, row_of
from fastgrpo.rewards.text import MAX_JSON, answer, fenced_json, pattern

SOURCE = "jefferyZhan/Griffon@9866875"
STAGE_STEP = 1500
MAX_LOOSE = 100  # boxes read by their pattern where the text is no JSON
_COLUMNS = ("solution",)
_OPTIONAL = (
    "target_id_maps", "num_instances", "width", "height", "input_widths", "input_heights",
)  # fmt: skip


@reward("vision_r1/precision", columns=_COLUMNS, optional=_OPTIONAL, source=SOURCE, batched=True)
def precision(
    texts,
    note,
    *,
    solution,
    step: int | None = None,
    adaptive: bool = False,
    trainer_state=None,
    compat: str,
    **columns,
):
    """Mean of f(GIoU) over the matched pairs; f is 0 below `low`, 1 above `high`, else GIoU.

    The answer is a JSON list of {"bbox_2d", "label"}, the solution a list of [label, box]. Pairs
    are an optimal assignment of the cost L1 distance in pixels - [equal label] - GIoU. (low, high)
    is (0.5, 0.75) before step 1500 and (0.75, 0.9) from it; without a step (`adaptive=False`, the
    released setting) GIoU counts as it is, negative values as 0. Boxes are scaled from
    `input_widths`, `input_heights` to `width`, `height` when the row has them. An answer without
    boxes gives 1 where `num_instances` (default: boxes of the solution) is 0, else 0.

    Source: jefferyZhan/Griffon@9866875, `precision_reward`. "upstream": extra boxes cost nothing
    and wrong labels cost nothing. "fixed": the sum is divided by the number of predicted boxes,
    and a pair with unequal labels counts 0.
    """
    step = _stage_step(step, adaptive, trainer_state)
    low, high = (0.0, 1.0) if step is None else (0.5, 0.75) if step < STAGE_STEP else (0.75, 0.9)
    rows = _Rows(texts, note, solution, columns, compat)

    def score(row: _Row) -> float:
        kept = _gate(row.giou, low, high)
        if compat == "upstream":
            return float(kept.mean()) if len(kept) else float("nan")
        return float(np.where(row.same_label, kept, 0.0).sum() / row.num_pred)

    return rows.values(score)


@reward("vision_r1/recall", columns=_COLUMNS, optional=_OPTIONAL, source=SOURCE, batched=True)
def recall(
    texts,
    note,
    *,
    solution,
    step: int | None = None,
    adaptive: bool = False,
    trainer_state=None,
    compat: str,
    **columns,
):
    """(Pairs with GIoU above a bound) / `num_instances`; pairs as in `vision_r1/precision`.

    The bound is 0.5, from step 1500 0.75. With a step (`adaptive=True`) a recall below 0.5 counts
    0 and above 0.75 counts 1.

    Source: jefferyZhan/Griffon@9866875, `recall_reward`. "upstream": a GIoU of exactly the bound
    counts by its value, wrong labels count. "fixed": the bound itself counts as reached, equal
    labels only.
    """
    step = _stage_step(step, adaptive, trainer_state)
    bound = 0.5 if step is None or step < STAGE_STEP else 0.75
    rows = _Rows(texts, note, solution, columns, compat)

    def score(row: _Row) -> float:
        if compat == "upstream":
            value = float(_gate(row.giou, bound, bound).sum(dtype=np.float32)) / row.num_instances
        else:
            reached = (row.giou >= bound) & row.same_label
            value = reached.sum() / max(row.num_instances, 1)
        if step is not None:
            value = 0.0 if value < 0.5 else 1.0 if value > 0.75 else value
        return float(value)

    return rows.values(score)


@reward("vision_r1/format", optional=("num_instances",), source=SOURCE)
def dual_format(text: str, *, num_instances: int | None = None, compat: str) -> float:
    """1 when the text is JSON whose items have a box of four; 1 minus that without instances.

    Source: jefferyZhan/Griffon@9866875, `dual_format_reward`. "upstream": any JSON will do (items
    without box or label are not looked at). "fixed": a list in which every item has an ordered
    box of four numbers and a label; without instances an empty list or "None" gives 1.
    """
    text = text.replace("```json\n", "").replace("\n```", "").strip()
    expected = num_instances is None or num_instances > 0
    if compat == "upstream":
        good = _upstream_format(text)
        return good if expected else 1.0 - good
    if not expected:
        return float(text.lower() in ("[]", "none", ""))
    if len(text) > MAX_JSON:
        raise Unscorable("json_too_long")
    items = json.loads(text)
    good = isinstance(items, list) and items and all(_is_item(item) for item in items)
    return float(bool(good))


def _upstream_format(text: str) -> float:
    try:
        items = json.loads(text)
    except json.JSONDecodeError:
        return 0.0
    if not isinstance(items, list):
        return 1.0
    boxes = [i["bbox_2d"] for i in items if isinstance(i, dict) and "bbox_2d" in i and "label" in i]
    return float(all(isinstance(box, list) and len(box) == 4 for box in boxes))


def _is_item(item: Any) -> bool:
    known = isinstance(item, dict) and isinstance(item.get("label"), str)
    return known and ordered_box(item.get("bbox_2d"))


def _stage_step(step: int | None, adaptive: bool, trainer_state) -> int | None:
    if step is not None or not adaptive:
        return step
    return progress(trainer_state, step, None)[0]


def _gate(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.where(values < low, 0.0, np.where(values > high, 1.0, values)).astype(np.float32)


class _Row:
    """The matched pairs of one row: GIoU and whether labels are equal."""

    def __init__(self, giou, same_label, num_pred: int, num_instances: int):
        self.giou, self.same_label = giou, same_label
        self.num_pred, self.num_instances = num_pred, num_instances


class _Rows:
    """All rows of a batch, matched in one call."""

    def __init__(self, texts, note, solutions, columns, compat: str):
        self.fixed: list[float | None] = [0.0] * len(texts)
        self.rows: dict[int, _Row] = {}
        said, truths, order = [], [], []
        for i, text in enumerate(texts):
            here = row_of(columns, i)
            try:
                truth = _solution(solutions[i], here.get("target_id_maps"), compat)
                found = _scaled(read_answer(text.strip(), compat), here)
            except BadColumn as fault:
                note(i, f"bad_column: {fault}")
                self.fixed[i] = None
                continue
            except Unscorable as fault:
                note(i, str(fault))
                continue
            instances = here.get("num_instances", len(truth.labels))
            if not found.labels:
                self.fixed[i] = float(not instances > 0)
            elif not truth.labels and compat == "fixed":
                self.fixed[i] = 0.0
            else:
                said.append(found)
                truths.append(truth)
                order.append((i, instances))
        self._match(said, truths, order)

    def _match(self, said, truths, order) -> None:
        pairs = overlaps(said, truths, kind="giou", same=_folded)
        distances = [
            np.abs(p.boxes[:, None] - g.boxes[None]).sum(-1).ravel()
            for p, g in zip(said, truths, strict=True)
        ]
        near = -np.concatenate(distances) if distances else np.empty(0)
        found = match(
            pairs._replace(iou=near + pairs.same_label + pairs.iou),
            method="optimal",
            same_label=False,
        )
        place = pairs.offsets.numpy()[found.row] + found.pred * pairs.gt_sizes[found.row] + found.gt
        for k, (i, instances) in enumerate(order):
            mine = place[found.row == k]
            self.rows[i] = _Row(
                pairs.iou[mine], pairs.same_label[mine], len(said[k].labels), instances
            )

    def values(self, score) -> list[float | None]:
        values = list(self.fixed)
        for i, row in self.rows.items():
            values[i] = score(row)
        return values


def _folded(label: str) -> str:
    return label.strip().lower()


def _solution(solution: Any, target_ids: Any, compat: str) -> Detections:
    """[[label, box], ...] as a list or JSON; "upstream" raises what is wrong with it."""
    try:
        pairs = json.loads(solution) if isinstance(solution, str) else list(solution)
        boxes = np.array([box for _, box in pairs], dtype=np.float64).reshape(-1, 4)
        labels = [label.lower() for label, _ in pairs]
    except (TypeError, ValueError, AttributeError) as fault:
        if compat == "upstream":
            raise
        raise BadColumn(f"solution: {fault}") from None
    if compat == "upstream" and not labels:
        raise RuntimeError("torch.cat(): expected a non-empty list of Tensors")
    return Detections(boxes, labels)


def _scaled(found: Detections, row: dict[str, Any]) -> Detections:
    if not {"width", "height", "input_widths", "input_heights"} <= set(row) or not found.labels:
        return found
    factor = row["width"] / row["input_widths"], row["height"] / row["input_heights"]
    return Detections(found.boxes * np.array([*factor, *factor]), found.labels)


_ITEM = (
    r'\{"bbox_2d": \[(\d{1,3}|1000), (\d{1,3}|1000), (\d{1,3}|1000), (\d{1,3}|1000)\], '
    r'"label": "([^"]+)"\}'
)


def read_answer(text: str, compat: str) -> Detections:
    """Boxes with x1 < x2 and y1 < y2, whole numbers, from JSON or else from its pattern."""
    if compat == "fixed":
        for inner in (answer(text, last=True), fenced_json(text, last=True)):
            text = text if inner is None else inner.strip()
    if len(text) > MAX_JSON:
        raise Unscorable("text_too_long")
    boxes, labels = [], []
    items = _json_items(text)
    if compat == "fixed" and len(items) > MAX_BOXES:
        raise Unscorable("too_many_boxes")
    for item in items:
        box, label = (
            (item.get(k) for k in ("bbox_2d", "label")) if isinstance(item, dict) else (0, 0)
        )
        try:
            corners = [int(v) for v in box] if isinstance(box, list) and len(box) == 4 else None
        except (TypeError, ValueError, OverflowError):
            continue
        if corners and corners[0] < corners[2] and corners[1] < corners[3]:
            if max(map(abs, corners)) < 1e9:
                boxes.append(corners)
                labels.append(label if isinstance(label, str) else None)
    if not boxes:
        found = pattern(_ITEM).finditer(text)
        for match_ in found if compat == "upstream" else islice(found, MAX_LOOSE):
            corners = [int(v) for v in match_.groups()[:4]]
            if corners[0] < corners[2] and corners[1] < corners[3]:
                boxes.append(corners)
                labels.append(match_.group(5))
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
