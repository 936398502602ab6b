# SPDX-License-Identifier: Apache-2.0
"""COCO average precision of each sample or of all: the protocol of pycocotools, in plain loops."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

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
    pooled: bool = False,
) -> torch.Tensor:
    """(B, len(thresholds)) float64 on the CPU; (len(thresholds),) pooled."""
    parts = _samples(
        pred_boxes, pred_labels, pred_scores, gt_boxes, gt_labels, pred_sizes, gt_sizes
    )
    settings = (thresholds, max_dets, area_range)
    if pooled:
        return torch.tensor(_all_samples(list(parts), *settings), dtype=torch.float64)
    rows = [_sample(*part, *settings) for part in parts]
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(thresholds))


def _samples(boxes, labels, scores, gt_boxes, gt_labels, pred_sizes, gt_sizes) -> Iterator[tuple]:
    preds = (values.split(pred_sizes) for values in (boxes, labels, scores))
    return zip(*preds, gt_boxes.split(gt_sizes), gt_labels.split(gt_sizes), strict=True)


def _pooled(samples: list[tuple]) -> list[float] | None:
    """AP per threshold of one class from what `_class` found in each sample."""
    counted = sum(number for _, _, number in samples)
    if counted == 0:
        return None
    order = torch.cat([scores for scores, _, _ in samples]).argsort(descending=True, stable=True)
    columns = zip(*(outcomes for _, outcomes, _ in samples), strict=True)
    ranked = ([outcome for sample in column for outcome in sample] for column in columns)
    return [_interpolate([flat[i] for i in order.tolist()], counted) for flat in ranked]


def _all_samples(samples, thresholds, max_dets, area_range) -> list[float]:
    """Boxes are matched sample by sample, and the outcomes of a class ranked by score over all
    samples, equal scores in the order of the samples."""
    found: dict[int, list] = {
        label: [] for *_, gt_labels in samples for label in gt_labels.tolist()
    }
    for boxes, labels, scores, gt_boxes, gt_labels in samples:
        for label in torch.cat([labels, gt_labels]).unique().tolist():
            if label in found:
                pred = labels == label
                own = (boxes[pred], scores[pred], gt_boxes[gt_labels == label])
                found[label].append(_class(*own, thresholds, max_dets, area_range))
    aps = [ap for ap in map(_pooled, found.values()) if ap is not None]
    if not aps and area_range is None:
        return [0.0 if any(len(boxes) for boxes, *_ in samples) else 1.0] * len(thresholds)
    return [sum(column) / len(aps) for column in zip(*aps, strict=True)] or [-1.0] * len(thresholds)


def _sample(boxes, labels, scores, gt_boxes, gt_labels, thresholds, max_dets, area_range):
    """Mean over the classes of the ground truth; see the public op for a sample without any."""
    if area_range is None and len(gt_boxes) == 0:
        return [1.0 if len(boxes) == 0 else 0.0] * len(thresholds)
    classes = []
    for label in gt_labels.unique().tolist():
        pred = labels == label
        own = (boxes[pred], scores[pred], gt_boxes[gt_labels == label])
        ap = _pooled([_class(*own, thresholds, max_dets, area_range)])
        if ap is not None:
            classes.append(ap)
    if not classes:
        return [-1.0] * len(thresholds)
    return [sum(column) / len(classes) for column in zip(*classes, strict=True)]


def _class(boxes, scores, gt_boxes, thresholds, max_dets, area_range):
    """Of one class in one sample: the falling scores of its first `max_dets` predictions, their
    outcomes at each threshold, and how many ground truths count.
    """
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    order = scores.argsort(descending=True, stable=True)[:max_dets]
    boxes, scores = boxes[order], scores[order]
    gt_ignored = _outside(gt_boxes, area_range)
    gt_order = gt_ignored.to(torch.int8).argsort(stable=True)  # ignored ground truth last
    gt_boxes, gt_ignored = gt_boxes[gt_order], gt_ignored[gt_order].tolist()
    iou = box_iou(boxes[:, None], gt_boxes[None], kind="iou", convention="continuous").tolist()
    ignored = _outside(boxes, area_range).tolist()
    outcomes = [_outcomes(iou, gt_ignored, ignored, t) for t in thresholds]
    return scores, outcomes, gt_ignored.count(False)


def _outcomes(iou, gt_ignored, ignored, threshold) -> list[bool | None]:
    """True or false positive of every prediction, None where it does not count: each takes the
    best free ground truth.
    """
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
            outcomes.append(None if gt_ignored[match] else True)
        else:
            outcomes.append(None if outside else False)
    return outcomes


def _interpolate(outcomes: list[bool | None], counted: int) -> float:
    """Mean over 101 recalls of the best precision at that recall or more."""
    recall, precision, hits = [], [], 0
    for rank, hit in enumerate((hit for hit in outcomes if hit is not None), 1):
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
