# SPDX-License-Identifier: Apache-2.0
"""Lists of labelled boxes as JSON: {"bbox_2d": [x1, y1, x2, y2], "label": str}."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson

from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.tags import fenced_json, last_answer

# Enough for 4,000 boxes; orjson needs about 3 ms and 20 MB for the worst text of this length.
MAX_JSON = 1 << 18
# A completion with more boxes is a repetition loop; 4,000 boxes fit into MAX_JSON.
MAX_BOXES = 1000
# The names models give the box of an item; Gemma writes the second.
BOX_KEYS = ("bbox_2d", "box_2d", "bbox")
_NO_BOX = (float("nan"),) * 4


class Detections(NamedTuple):
    """boxes (n, 4) float64, NaN where an item has no usable box; labels, None where missing."""

    boxes: np.ndarray
    labels: list[str | None]


EMPTY = Detections(np.empty((0, 4)), [])


def loads(text: str) -> Any:
    """Strict JSON under a length cap; raises Unscorable with the reason."""
    if len(text) > MAX_JSON:
        raise Unscorable("json_too_long")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Unscorable("bad_json") from None


def load_list(text: str) -> list[Any]:
    """A JSON list under the length cap; Unscorable for anything else."""
    items = loads(text)
    if not isinstance(items, list):
        raise Unscorable("not_a_list")
    return items


class _Item(msgspec.Struct):
    bbox_2d: tuple[float, float, float, float]
    label: str


_decode_items = msgspec.json.Decoder(list[_Item]).decode


def read_detections(text: str) -> Detections:
    """The detections of a JSON list of {"bbox_2d", "label"}, fenced or bare.

    "None" and "[]" are no detections. An item without a box of four finite numbers or without a
    label stays as a prediction that matches nothing. Raises Unscorable when it is no such JSON.
    """
    fenced = fenced_json(text, last=True)
    text = (text if fenced is None else fenced).strip()
    if len(text) <= 4 and text.lower() in ("none", "[]", ""):
        if not text:
            raise Unscorable("empty_answer")
        return EMPTY
    if len(text) > MAX_JSON:
        raise Unscorable("json_too_long")
    try:
        items = _decode_items(text)
    except (msgspec.DecodeError, RecursionError):
        return _read_loosely(loads(text))
    if len(items) > MAX_BOXES:
        raise Unscorable("too_many_boxes")
    corners = chain.from_iterable([item.bbox_2d for item in items])
    boxes = np.fromiter(corners, dtype=np.float64, count=4 * len(items))
    return Detections(boxes.reshape(-1, 4), [item.label for item in items])


def _read_loosely(items: Any) -> Detections:
    """The same item by item, for lists in which some item is not as it should be."""
    if isinstance(items, dict):
        items = [items]
    if not isinstance(items, list):
        raise Unscorable("not_a_list")
    boxes, labels = [], []
    for item in items:
        box = box_of(item)
        label = item.get("label") if isinstance(item, dict) else None
        boxes.append(box if _four_numbers(box) else _NO_BOX)
        labels.append(label if isinstance(label, str) else None)
    if len(boxes) > MAX_BOXES:
        raise Unscorable("too_many_boxes")
    return Detections(np.array(boxes, dtype=np.float64).reshape(-1, 4), labels)


def box_of(item: Any) -> Any:
    """What an item says under the name of a box, None without one."""
    if not isinstance(item, dict):
        return None
    return next((item[key] for key in BOX_KEYS if key in item), None)


def _four_numbers(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)


def solution_detections(solution: Any) -> Detections:
    """Ground truth from a tagged or fenced string, or from a list of items as it is.

    Raises BadColumn unless every item has a label and an ordered box of finite numbers.
    """
    if solution is None:
        return EMPTY
    try:
        if not isinstance(solution, str):
            solution = json.dumps(list(solution))
        truth = read_detections(last_answer(solution))
    except (Unscorable, TypeError, ValueError) as fault:
        raise BadColumn(f"solution: {fault}") from None
    if None in truth.labels or not np.isfinite(truth.boxes).all():
        raise BadColumn("solution: an item lacks box or label")
    if (truth.boxes[:, :2] > truth.boxes[:, 2:]).any():
        raise BadColumn("solution: a box is reversed")
    return truth
