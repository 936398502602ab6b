# SPDX-License-Identifier: Apache-2.0
"""DIP-R1, by its abstract: think, look, answer; precision and recall; uncertain objects."""

from __future__ import annotations

import numpy as np

from fastgrpo.rewards.core.columns import group_numbers
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import detection_truth
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.geometry.matching import folded, match, overlaps
from fastgrpo.rewards.read.faults import Unscorable
from fastgrpo.rewards.read.items import EMPTY, Detections, read_detections
from fastgrpo.rewards.read.tags import SPACE, between, last_answer, pattern
from fastgrpo.rewards.systems.vlm_r1_detection import place, read_rows, where_empty

SOURCE = "DIP-R1, our own reading of the abstract"


@reward("dip_r1/format", source=SOURCE)
def dip_format(text: str) -> float:
    """1 for one `<think>`, one `<look>` and one `<answer>` block in this order, else 0.

    DIP-R1's abstract names the three tags; the strictness is ours.
    """
    whole = (
        rf"{SPACE}*<think>.*?</think>{SPACE}*<look>.*?</look>{SPACE}*<answer>.*?</answer>{SPACE}*"
    )
    once = all(text.count(f"<{tag}>") == 1 for tag in ("think", "look", "answer"))
    return float(once and pattern(whole).fullmatch(text) is not None)


@reward("dip_r1/precision_recall", columns=("solution",), source=SOURCE, batched=True,
        framed=True, truth=detection_truth)  # fmt: skip
def dip_precision_recall(
    texts, note, *, solution, frames, precision_weight: float = 0.5, iou_threshold: float = 0.5
):
    """w * precision + (1 - w) * recall of the answer's boxes at IoU >= 0.5, equal labels.

    DIP-R1's abstract has a "weighted precision-recall" reward; w and the threshold are ours.
    """
    values, preds, gts, rows = read_rows(texts, note, solution, frames, last_answer)
    pairs = overlaps(preds, gts, same=folded)
    found = match(pairs, threshold=iou_threshold, same_label=True)
    hits = np.bincount(found.row, minlength=len(rows))
    precision, recall = (hits / np.maximum(n, 1) for n in (pairs.pred_sizes, pairs.gt_sizes))
    score = precision_weight * precision + (1 - precision_weight) * recall
    return place(values, rows, where_empty(score, pairs.pred_sizes, pairs.gt_sizes))


def _look_truth(*, solution, frames, **columns) -> str:
    said = detection_truth(solution=solution, frames=frames)
    looked = between(said, "<answer>", "</answer>")
    return said.replace("<answer>", f"<look>{looked}</look><answer>")


@reward("dip_r1/look", columns=("solution",), optional=("prompts",), source=SOURCE, batched=True,
        framed=True, truth=_look_truth)  # fmt: skip
def dip_look(texts, note, *, solution, frames, prompts=None, iou_threshold: float = 0.5):
    """Share of the uncertain objects that the boxes of `<look>` cover, weighted by uncertainty.

    An object's weight is the variance, over the completions of its group, of the best IoU that the
    answer's boxes reach with it; it is covered by a look box with IoU >= 0.5. Without any variance
    all objects weigh the same. DIP-R1's abstract speaks of a variance-guided reward on regions
    looked at; this formula is ours.
    """
    values, preds, gts, rows = read_rows(texts, note, solution, frames, last_answer)
    looks = [_looked(texts[i], frames[i]) for i in rows]
    best = [_best(one, gt) for one, gt in zip(preds, gts, strict=True)]
    seen = [_best(one, gt) >= iou_threshold for one, gt in zip(looks, gts, strict=True)]
    number = group_numbers(prompts, len(texts))[rows] if rows else []
    scores = np.zeros(len(rows))
    for k in range(len(rows)):
        mates = [best[j] for j in range(len(rows)) if number[j] == number[k]]
        same = [b for b in mates if len(b) == len(best[k])]
        weight = np.var(same, axis=0) if same else np.ones(len(best[k]))
        weight = weight if weight.sum() > 0 else np.ones(len(best[k]))
        scores[k] = (weight * seen[k]).sum() / weight.sum() if len(weight) else 0.0
    return place(values, rows, scores)


def _looked(text: str, frame: RowFrames) -> Detections:
    try:
        found = read_detections(between(text, "<look>", "</look>") or "[]")
    except Unscorable:
        return EMPTY
    return Detections(frame.to_solution(found.boxes), found.labels)


def _best(boxes: Detections, gt: Detections) -> np.ndarray:
    """(n_gt,) best IoU with any of the boxes."""
    if not boxes.labels or not gt.labels:
        return np.zeros(len(gt.labels))
    return overlaps([boxes], [gt]).iou.reshape(len(boxes.labels), -1).max(0)
