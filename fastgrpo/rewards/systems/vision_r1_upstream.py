# SPDX-License-Identifier: Apache-2.0
"""`vision_r1` as published (jefferyZhan/Griffon@9866875)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read.faults import Unscorable
from fastgrpo.rewards.read.items import Detections
from fastgrpo.rewards.systems import vision_r1 as fixed


@published(fixed.precision)
def precision(
    text: str, *, solution, step: int | None = None, adaptive: bool = False, trainer_state=None,
    num_instances=None, width=None, height=None, input_widths=None, input_heights=None,
) -> float:  # fmt: skip
    """The mean over the matched pairs, whatever their labels; NaN without a pair."""
    low, high = fixed.precision_bounds(fixed.stage_step(step, adaptive, trainer_state))
    row = _row(text, solution, num_instances, width, height, input_widths, input_heights)
    if isinstance(row, float):
        return row
    kept = fixed.gate(row.giou, low, high)
    return float(kept.mean()) if len(kept) else float("nan")


@published(fixed.recall)
def recall(
    text: str, *, solution, step: int | None = None, adaptive: bool = False, trainer_state=None,
    num_instances=None, width=None, height=None, input_widths=None, input_heights=None,
) -> float:  # fmt: skip
    """A GIoU of exactly the bound counts by its value, wrong labels count."""
    step = fixed.stage_step(step, adaptive, trainer_state)
    row = _row(text, solution, num_instances, width, height, input_widths, input_heights)
    if isinstance(row, float):
        return row
    bound = fixed.recall_bound(step)
    total = float(fixed.gate(row.giou, bound, bound).sum(dtype=np.float32))
    return fixed.staged(total / row.num_instances, step)


def _row(text, solution, num_instances, width, height, input_width, input_height):
    """The matched pairs, or the value where there is nothing to match."""
    truth = _solution(solution)
    instances = len(truth.labels) if num_instances is None else num_instances
    try:
        found = fixed.read_answer(text.strip(), int, None, None)
    except Unscorable:
        return 0.0
    if not found.labels:
        return float(not instances > 0)
    if None not in (width, height, input_width, input_height):
        factor = width / input_width, height / input_height
        found = Detections(found.boxes * np.array([*factor, *factor]), found.labels)
    return fixed.match_rows([found], [truth], [instances])[0]


def _solution(solution: Any) -> Detections:
    pairs = json.loads(solution) if isinstance(solution, str) else list(solution)
    boxes = np.array([box for _, box in pairs], dtype=np.float64).reshape(-1, 4)
    if not pairs:
        raise RuntimeError("torch.cat(): expected a non-empty list of Tensors")
    return Detections(boxes, [label.lower() for label, _ in pairs])


@published(fixed.dual_format)
def dual_format(text: str, *, num_instances: int | None = None) -> float:
    """Any JSON will do; items without box or label are not looked at."""
    good = _format(fixed.without_fences(text))
    return good if num_instances is None or num_instances > 0 else 1.0 - good


def _format(text: str) -> float:
    try:
        items = json.loads(text)
    except json.JSONDecodeError:
        return 0.0
    if not isinstance(items, list):
        return 1.0
    boxes = [i["bbox_2d"] for i in items if isinstance(i, dict) and "bbox_2d" in i and "label" in i]
    return float(all(isinstance(box, list) and len(box) == 4 for box in boxes))
