"""Lists of labelled boxes: read once from text, overlapped and matched in one call per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from fastgrpo.ops.box_iou import pairwise_box_iou
from fastgrpo.ops.match_boxes import match_boxes
from fastgrpo.rewards.registry import Unscorable
from fastgrpo.rewards.text import MAX_JSON, fenced_json, loads

# A completion with more boxes is a repetition loop; 4,000 boxes fit into MAX_JSON.
MAX_BOXES = 1000
_NO_BOX = (float("nan"),) * 4


class Detections(NamedTuple):
    """boxes (n, 4) float64, NaN where an item has no usable box; labels, None where missing."""

    boxes: np.ndarray
    labels: list[str | None]


EMPTY = Detections(np.empty((0, 4)), [])


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
        box = item.get("bbox_2d") if isinstance(item, dict) else None
        label = item.get("label") if isinstance(item, dict) else None
        boxes.append(box if _four_numbers(box) else _NO_BOX)
        labels.append(label if isinstance(label, str) else None)
    if len(boxes) > MAX_BOXES:
        raise Unscorable("too_many_boxes")
    return Detections(np.array(boxes, dtype=np.float64).reshape(-1, 4), labels)


def _four_numbers(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)


class Overlaps(NamedTuple):
    """Every prediction with every ground truth of its row, rows after one another.

    iou and same_label are flat over pairs; row, pred and gt tell a pair's place, pred and gt
    counted over the whole batch.
    """

    iou: np.ndarray
    same_label: np.ndarray
    offsets: torch.Tensor
    pred_sizes: np.ndarray
    gt_sizes: np.ndarray


def overlaps(
    preds: Sequence[Detections],
    gts: Sequence[Detections],
    *,
    kind: str = "iou",
    convention: str = "continuous",
    same: Callable[[str], str] = str,
) -> Overlaps:
    """IoU and equality of labels of all pairs of the batch; `same` maps labels before."""
    pred_sizes = np.array([len(p.labels) for p in preds], dtype=np.int64)
    gt_sizes = np.array([len(g.labels) for g in gts], dtype=np.int64)
    iou, offsets = pairwise_box_iou(
        _stack(preds), _stack(gts), pred_sizes.tolist(), gt_sizes.tolist(),
        kind=kind, convention=convention,
    )  # fmt: skip
    codes = _Codes(same)
    labels = codes.of(preds, pred_sizes, -1), codes.of(gts, gt_sizes, -2)
    equal = [(p[:, None] == g[None]).ravel() for p, g in zip(*labels, strict=True)]
    same_label = np.concatenate(equal) if equal else np.empty(0, dtype=bool)
    return Overlaps(iou.numpy(), same_label, offsets, pred_sizes, gt_sizes)


def _stack(rows: Sequence[Detections]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([r.boxes for r in rows] or [EMPTY.boxes]))


class _Codes(dict):
    """Labels as numbers, equal where `same` makes them equal; a missing label equals nothing."""

    def __init__(self, same: Callable[[str], str]):
        self.same, self.numbers = same, {}

    def __missing__(self, label: str) -> int:
        self[label] = number = self.numbers.setdefault(self.same(label), len(self.numbers))
        return number

    def of(self, rows: Sequence[Detections], sizes: np.ndarray, missing: int) -> list[np.ndarray]:
        self[None] = missing
        flat = np.array([self[label] for row in rows for label in row.labels], dtype=np.int64)
        return np.split(flat, np.cumsum(sizes)[:-1]) if len(rows) else []


class Matches(NamedTuple):
    """One entry per matched pair: its row, prediction and ground truth (within the row), IoU."""

    row: np.ndarray
    pred: np.ndarray
    gt: np.ndarray
    iou: np.ndarray


def match(
    pairs: Overlaps, *, method: str = "greedy", threshold: float | None = None, same_label: bool
) -> Matches:
    """One-to-one pairs of each row (see `fg.match_boxes`), restricted to equal labels if asked."""
    columns = match_boxes(
        torch.from_numpy(pairs.iou),
        pairs.offsets,
        pairs.pred_sizes.tolist(),
        pairs.gt_sizes.tolist(),
        method=method,
        threshold=threshold,
        mask=torch.from_numpy(pairs.same_label) if same_label else None,
    ).numpy()
    matched = np.flatnonzero(columns >= 0)
    starts = np.concatenate(([0], np.cumsum(pairs.pred_sizes)))
    row = np.searchsorted(starts, matched, side="right") - 1
    pred, gt = matched - starts[row], columns[matched]
    place = pairs.offsets.numpy()[row] + pred * pairs.gt_sizes[row] + gt
    return Matches(row, pred, gt, pairs.iou[place])


def completeness(num_pred: np.ndarray, num_gt: np.ndarray, num_matched: np.ndarray) -> np.ndarray:
    """1 - (share of missed ground truth + share of false predictions) / 2, no share of nothing."""
    missed = (num_gt - num_matched) / np.maximum(num_gt, 1)
    false = (num_pred - num_matched) / np.maximum(num_pred, 1)
    return 1 - (missed + false) / 2
