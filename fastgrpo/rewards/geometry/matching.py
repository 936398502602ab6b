# SPDX-License-Identifier: Apache-2.0
"""Lists of labelled boxes, overlapped and matched in one call per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastgrpo.ops.box_iou import pairwise_box_iou
from fastgrpo.ops.match_boxes import match_boxes
from fastgrpo.rewards.read.items import EMPTY, Detections


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


def folded(label: str) -> str:
    """A label without case and outer blanks."""
    return label.strip().lower()
