# SPDX-License-Identifier: Apache-2.0
"""`vlm_r1_detection` as published (om-ai-lab/VLM-R1@90052f4)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fastgrpo.ops.average_precision import average_precision
from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.geometry.matching import match, overlaps
from fastgrpo.rewards.read.items import MAX_JSON, Detections
from fastgrpo.rewards.read.tags import answer, fenced_json
from fastgrpo.rewards.read.words import clean_text
from fastgrpo.rewards.systems.vlm_r1_detection import STATS, map_reward, od_reward, weighted_sum


@published(map_reward)
def published_map(text: str, *, solution: str, score_type: int = 0) -> float:
    """COCO AP with all scores equal."""
    return upstream_map(text, solution, score_type, False)


@published(od_reward)
def published_od(text: str, *, solution: str, score_type: int = 0, length: bool = False) -> float:
    """`published_map` of the last answer; "None" wants "None"."""
    content, truth = answer(text, last=True), answer(solution)
    if content is None:
        return 0.0
    content, truth = content.strip(), truth if truth is None else truth.strip()
    if truth == content == "None":
        return 1.0
    if truth is None:
        raise TypeError("expected string or bytes-like object, got 'NoneType'")
    return upstream_map(content, truth, score_type, length)


@published(weighted_sum)
def published_weighted_sum(
    text: str,
    *,
    solution: str,
    iou_threshold: float = 0.5,
    alpha: float = 0.7,
    beta: float = 0.0,
    gamma: float = 0.3,
) -> float:
    """`detection_score` of the cleaned texts; a solution "none" wants "none"."""
    said, truth = clean_text(text), clean_text(solution)
    if truth == "none":
        return float(said == "none")
    return detection_score(said, truth, iou_threshold, alpha, beta, gamma)


def _upstream_items(block: str | None) -> list[Any]:
    """The items of a JSON list; whatever json.loads or iteration raises, raises here."""
    if not block:
        return []
    if len(block) > MAX_JSON:
        raise ValueError("block beyond the length cap")
    return list(json.loads(block.strip()))


def _upstream_preds(block: str | None) -> list[Any]:
    try:
        return _upstream_items(block)
    except (ValueError, TypeError, RecursionError):
        return []


def upstream_map(text: str, solution: str, score_type: int, length: bool) -> float:
    gts = _upstream_items((fenced_json(solution, last=True) or "").strip())
    preds = _upstream_preds(fenced_json(text, last=True))
    if preds and gts:
        score = coco_ap(preds, gts, score_type)
    else:
        score = float(not preds and not gts)
    if length and len(gts) < len(preds):
        score *= len(gts) / len(preds)
    return score


def coco_ap(preds: list[Any], gts: list[Any], score_type: int) -> float:
    """pycocotools' stats[0] or stats[1] of one image, unknown labels and bad items left out."""
    classes, gt_boxes = {}, []
    for gt in gts:
        classes[gt["label"]] = None
        gt_boxes.append(_four(gt))
    boxes, labels = [], []
    for pred in preds:
        try:
            if pred["label"] in classes:
                boxes.append(_four(pred))
                labels.append(pred["label"])
        except (TypeError, KeyError, IndexError):
            continue
    if not boxes:
        return 0.0
    return average_precision(
        np.array(boxes, dtype=np.float64),
        labels,
        None,
        np.array(gt_boxes, dtype=np.float64),
        [gt["label"] for gt in gts],
        [len(boxes)],
        [len(gts)],
        thresholds=STATS[score_type],
        area_range=(0, 1e10),
    ).item()


def _four(item: Any) -> list[float]:
    box = item["bbox_2d"]
    x1, y1 = box[0], box[1]
    # The published code goes on with these differences, so what is no number raises here.
    _ = box[2] - x1, box[3] - y1
    return [float(x1), float(y1), float(box[2]), float(box[3])]


def detection_score(
    content: str, solution: str, iou_threshold=0.5, alpha=0.7, beta=0.0, gamma=0.3
) -> float:
    """`detection_score` as published, on text that holds the first fenced block."""
    preds = _upstream_preds(fenced_json(clean_text(content)))
    gts = _upstream_items((fenced_json(clean_text(solution)) or "").strip())
    if not gts or not preds:
        return float(not gts and not preds)
    boxes = [
        Detections(np.array([_or_none(i) for i in side]), [""] * len(side)) for side in (preds, gts)
    ]
    pairs = overlaps(boxes[:1], boxes[1:], convention="vlm_r1")
    found = match(pairs, threshold=iou_threshold, same_label=False)
    order = np.lexsort((found.gt, found.pred, -found.iou))
    ious, label = [], None
    for pred, gt, iou in zip(found.pred[order], found.gt[order], found.iou[order], strict=True):
        wanted = _lower(gts[gt])
        spoken = _lower(preds[pred])
        label = spoken if spoken is not None else label
        if label is None:
            raise UnboundLocalError("pred_label: the first match has no label")
        if label == (wanted or ""):
            ious.append(iou)
    missed, false = len(gts) - len(order), len(preds) - len(order)
    position, right = sum(ious) / len(gts), len(ious) / len(gts)
    whole = 1.0 - (missed / len(gts) + false / len(preds)) / 2.0
    return float((alpha * position + beta * right + gamma * whole) / (alpha + beta + gamma))


def _or_none(item: Any) -> list[float]:
    try:
        return _four(item)
    except (TypeError, KeyError, IndexError, OverflowError):
        return [float("nan")] * 4


def _lower(item: Any) -> str | None:
    label = item.get("label") if isinstance(item, dict) else None
    return label.lower() if isinstance(label, str) else None
