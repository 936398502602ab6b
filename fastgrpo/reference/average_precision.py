# SPDX-License-Identifier: Apache-2.0
"""COCO average precision of one sample at a time: the protocol of pycocotools, in plain loops."""

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch

from fastgrpo.reference.box_iou import box_iou

COCO = tuple(0.5 + (0.95 - 0.5) / 9 * i for i in range(10))  # numpy.linspace, bit for bit
RECALLS = tuple(0.01 * i for i in range(100)) + (1.0,)
EPS = 2.0**-52  # keeps 0 / 0 out of the precision


def average_precision(
    pred_boxes: torch.Tensor,
    pred_labels: torch.Tensor,
    pred_scores: torch.Tensor,
    gt_boxes: torch.Tensor,
    gt_labels: torch.Tensor,
    pred_sizes: list[int],
    gt_sizes: list[int],
    *,
    thresholds: Sequence[float],
    max_dets: int,
    area_range: tuple[float, float] | None,
) -> torch.Tensor:
    """(B, len(thresholds)) float64 on the CPU."""
    parts = zip(
        pred_boxes.split(pred_sizes),
        pred_labels.split(pred_sizes),
        pred_scores.split(pred_sizes),
        gt_boxes.split(gt_sizes),
        gt_labels.split(gt_sizes),
        strict=True,
    )
    rows = [_sample(*part, thresholds, max_dets, area_range) for part in parts]
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(thresholds))


def _sample(boxes, labels, scores, gt_boxes, gt_labels, thresholds, max_dets, area_range):
    """Mean over the classes of the ground truth; see the public op for a sample without any."""
    if area_range is None and len(gt_boxes) == 0:
        return [1.0 if len(boxes) == 0 else 0.0] * len(thresholds)
    classes = []
    for label in gt_labels.unique().tolist():
        pred, gt = labels == label, gt_labels == label
        order = torch.where(scores[pred].isnan(), -torch.inf, scores[pred])
        order = order.argsort(descending=True, stable=True)[:max_dets]
        ap = _class(boxes[pred][order], gt_boxes[gt], thresholds, area_range)
        if ap is not None:
            classes.append(ap)
    if not classes:
        return [-1.0] * len(thresholds)
    return [sum(column) / len(classes) for column in zip(*classes, strict=True)]


def _class(boxes, gt_boxes, thresholds, area_range):
    """AP per threshold of one class, predictions in falling order; None without counted gt."""
    gt_ignored = _outside(gt_boxes, area_range)
    gt_order = gt_ignored.to(torch.int8).argsort(stable=True)  # ignored ground truth last
    gt_boxes, gt_ignored = gt_boxes[gt_order], gt_ignored[gt_order].tolist()
    counted = gt_ignored.count(False)
    if counted == 0:
        return None
    iou = box_iou(boxes[:, None], gt_boxes[None], kind="iou", convention="continuous").tolist()
    ignored = _outside(boxes, area_range).tolist()
    return [_interpolate(_outcomes(iou, gt_ignored, ignored, t), counted) for t in thresholds]


def _outcomes(iou, gt_ignored, ignored, threshold) -> list[bool]:
    """True or false positive of every prediction that counts: each takes the best free gt."""
    taken = [False] * len(gt_ignored)
    outcomes = []
    for row, outside in zip(iou, ignored, strict=True):
        best, match = min(threshold, 1 - 1e-10), -1
        for g, value in enumerate(row):
            if taken[g]:
                continue
            if match >= 0 and not gt_ignored[match] and gt_ignored[g]:
                break
            if value >= best:
                best, match = value, g
        if match >= 0:
            taken[match] = True
            if not gt_ignored[match]:
                outcomes.append(True)
        elif not outside:
            outcomes.append(False)
    return outcomes


def _interpolate(outcomes: list[bool], counted: int) -> float:
    """Mean over 101 recalls of the best precision at that recall or more."""
    recall, precision, hits = [], [], 0
    for rank, hit in enumerate(outcomes, 1):
        hits += hit
        recall.append(hits / counted)
        precision.append(hits / (rank + EPS))
    for i in range(len(precision) - 1, 0, -1):
        precision[i - 1] = max(precision[i - 1], precision[i])
    reached = (bisect_left(recall, r) for r in RECALLS)
    return math.fsum(precision[i] for i in reached if i < len(recall)) / len(RECALLS)


def _outside(boxes: torch.Tensor, area_range: tuple[float, float] | None) -> torch.Tensor:
    """Boxes whose signed area lies outside the range count neither as hit nor as miss."""
    if area_range is None:
        return boxes.new_zeros(len(boxes), dtype=torch.bool)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (area < area_range[0]) | (area > area_range[1])
