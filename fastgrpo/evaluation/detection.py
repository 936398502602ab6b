# SPDX-License-Identifier: Apache-2.0
"""COCO's detection figures of written answers: boxes, labels and, where given, confidences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgrpo.ops.average_precision import COCO, average_precision
from fastgrpo.rewards.read.faults import Unscorable
from fastgrpo.rewards.read.items import Detections, loads, read_detections
from fastgrpo.rewards.read.tags import fenced_json, last_answer

CONFIDENCES = ("score", "confidence")
Found = tuple[Detections, list[float], Detections]  # an answer, its confidences, the solution


def read_answer(text: str) -> tuple[Detections, list[float]]:
    """The detections of the last `<answer>` (or of the text) and their confidences, 1 where an item
    states none. Raises `Unscorable` when they cannot be read.
    """
    said = last_answer(text)
    detections = read_detections(said)
    return detections, _confidences(said, len(detections.labels))


def _confidences(said: str, count: int) -> list[float]:
    if not any(f'"{key}"' in said for key in CONFIDENCES):
        return [1.0] * count
    fenced = fenced_json(said, last=True)
    items = loads((said if fenced is None else fenced).strip())
    items = items if isinstance(items, list) else [items]
    return [_confidence(item) for item in items]


def _confidence(item: object) -> float:
    stated = [item[key] for key in CONFIDENCES if key in item] if isinstance(item, dict) else []
    if not stated:
        return 1.0
    if type(stated[0]) not in (int, float):
        raise Unscorable("confidence_not_a_number")
    return float(stated[0])


def row_precisions(found: Sequence[Found]) -> list[float]:
    """Average precision of each image by itself; 1 where neither side has a box."""
    return _precision(found).mean(1).tolist() if found else []


def figures(found: Sequence[Found]) -> dict[str, float]:
    """COCOeval's stats[0], stats[1] and stats[2] over all images, in the order of the rows.

    Predictions of labels that no solution has cost nothing there, as in COCO; `unknown_labels`
    counts them. Where answers state no confidences all are equal, so that the order of boxes and
    of rows decides between them, as with any COCO figure of such answers.
    """
    ap = _precision(found, pooled=True)
    labels = {label for _, _, truth in found for label in truth.labels}
    unknown = sum(label not in labels for said, _, _ in found for label in said.labels)
    return {
        "mAP": float(ap.mean()),
        "AP50": float(ap[0]),
        "AP75": float(ap[5]),
        "boxes": sum(len(truth.labels) for _, _, truth in found),
        "predicted": sum(len(said.labels) for said, _, _ in found),
        "unknown_labels": unknown,
    }


def _precision(found: Sequence[Found], pooled: bool = False) -> torch.Tensor:
    sides = [said for said, _, _ in found], [truth for _, _, truth in found]
    boxes = [
        torch.cat([torch.as_tensor(one.boxes, dtype=torch.float64).reshape(-1, 4) for one in side])
        for side in sides
    ]
    labels = [[label for one in side for label in one.labels] for side in sides]
    sizes = [[len(one.labels) for one in side] for side in sides]
    scores = [score for _, own, _ in found for score in own]
    return average_precision(
        boxes[0], labels[0], scores, boxes[1], labels[1], *sizes,
        thresholds=COCO, per_threshold=True, pooled=pooled,
    )  # fmt: skip
