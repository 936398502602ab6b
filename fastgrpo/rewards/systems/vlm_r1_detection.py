# SPDX-License-Identifier: Apache-2.0
"""VLM-R1's rewards for detection: mAP, AP50, odLength, weighted sum (om-ai-lab/VLM-R1@90052f4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastgrpo.ops.average_precision import COCO, RECALLS
from fastgrpo.rewards.core.guard import Note
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import detection_truth
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.geometry.matching import Overlaps, completeness, folded, match, overlaps
from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.items import Detections, read_detections, solution_detections
from fastgrpo.rewards.read.tags import answer, last_answer
from fastgrpo.rewards.systems.vlm_r1 import SOURCE

# COCO's stats[0], stats[1], stats[2]: all thresholds, 0.50, 0.75.
STATS = (COCO, COCO[:1], COCO[5:6])


@reward(
    "vlm_r1/map",
    columns=("solution",),
    upstream_range=(-1.0, 1.0),
    source=SOURCE,
    batched=True,
    framed=True,
    truth=detection_truth,
    presets={"vlm_r1/map50": {"score_type": 1}},
)
def map_reward(
    texts: list[str], note: Note, *, solution, frames: list[RowFrames], score_type: int = 0
) -> list[float | None]:
    """COCO AP of the detections, `score_type` 0: IoU 0.50:0.95, 1: 0.50, 2: 0.75.

    Reads the last ```` ```json ```` block of the whole completion and of the solution, lists of
    {"bbox_2d": [x1, y1, x2, y2], "label": str}. Both without boxes: 1; one without: 0.

    Source: om-ai-lab/VLM-R1@90052f4, `map_reward`. "upstream": COCO's protocol with all scores
    equal, so the order of the boxes decides, predicted labels that the solution lacks cost
    nothing, boxes after the hits cost nothing, at most 100 boxes count, a solution with only
    negative areas gives -1, and a bad solution raises. "fixed": the answer has no confidences, so
    it is one operating point: with precision P and recall R of a class at each IoU threshold,
    AP = P * (share of the 101 recall levels that R reaches), averaged over thresholds and over the
    classes of the solution and of the answer (predicted classes the solution lacks count 0). The
    order does not matter, duplicates and unknown labels cost, a perfect answer is exactly 1, and
    the JSON need not be fenced. A bad solution gives None.
    """
    return _map(texts, note, solution, frames, str, score_type)


@reward(
    "vlm_r1/od_ap",
    columns=("solution",),
    upstream_range=(-1.0, 1.0),
    source=SOURCE,
    batched=True,
    framed=True,
    truth=detection_truth,
    presets={
        "vlm_r1/od_ap50": {"score_type": 1},
        "vlm_r1/od_length": {"length": True},
        "vlm_r1/odLength": {"length": True},
    },
)
def od_reward(
    texts: list[str],
    note: Note,
    *,
    solution,
    frames: list[RowFrames],
    score_type: int = 0,
    length: bool = False,
) -> list[float | None]:
    """`vlm_r1/map` of the last `<answer>`; times min(1, n_gt / n_pred) with `length=True`.

    No answer gives 0; "None" in answer and solution gives 1.

    Source: om-ai-lab/VLM-R1@90052f4, `od_reward`, `odLength_reward`. "upstream": as `vlm_r1/map`,
    and where the solution is None any text without a fenced block gives 1. "fixed": as
    `vlm_r1/map`; a solution of None wants the answer None or an empty list.
    """
    return _map(texts, note, solution, frames, _tagged, score_type, length=length)


@reward("vlm_r1/weighted_sum", columns=("solution",), source=SOURCE, batched=True, framed=True,
        truth=detection_truth)  # fmt: skip
def weighted_sum(
    texts: list[str],
    note: Note,
    *,
    solution,
    frames: list[RowFrames],
    iou_threshold: float = 0.5,
    alpha: float = 0.7,
    beta: float = 0.0,
    gamma: float = 0.3,
) -> list[float | None]:
    """(alpha * position + beta * label + gamma * completeness) / (alpha + beta + gamma).

    Boxes are matched greedily, best IoU first, down to `iou_threshold`. position = sum of IoU of
    the matches with equal labels / n_gt, label = their number / n_gt, completeness = 1 - (missed /
    n_gt + false / n_pred) / 2. Both without boxes: 1; one without: 0.

    Source: om-ai-lab/VLM-R1@90052f4, `detection_score` as dispatched by `accuracy_reward`.
    "upstream": IoU with its -1/+1 convention, a match with the wrong label still counts as
    complete (swapped labels score 0.3), a prediction without label raises UnboundLocalError or
    takes the label of the match before it, and "None" wants "None". "fixed": continuous IoU, only
    equal labels (any case) match, a missing label equals nothing, and None and [] are the same.
    """
    values, preds, gts, rows = read_rows(texts, note, solution, frames, last_answer)
    pairs = overlaps(preds, gts, same=folded)
    found = match(pairs, threshold=iou_threshold, same_label=True)
    num_pred, num_gt = pairs.pred_sizes, pairs.gt_sizes
    matched = np.bincount(found.row, minlength=len(rows))
    ious = np.bincount(found.row, weights=found.iou, minlength=len(rows))
    position, label = ious / np.maximum(num_gt, 1), matched / np.maximum(num_gt, 1)
    whole = completeness(num_pred, num_gt, matched)
    score = (alpha * position + beta * label + gamma * whole) / (alpha + beta + gamma)
    return place(values, rows, where_empty(score, num_pred, num_gt))


def _map(texts, note, solution, frames, read, score_type, *, length=False) -> list[float | None]:
    values, preds, gts, rows = read_rows(texts, note, solution, frames, read)
    pairs = overlaps(preds, gts)
    score = operating_point_ap(pairs, preds, gts, STATS[score_type])
    if length:
        score = score * np.minimum(1, pairs.gt_sizes / np.maximum(pairs.pred_sizes, 1))
    return place(values, rows, where_empty(score, pairs.pred_sizes, pairs.gt_sizes))


def operating_point_ap(
    pairs: Overlaps, preds: list[Detections], gts: list[Detections], thresholds
) -> np.ndarray:
    """(rows,) AP without confidences; see `vlm_r1/map`.

    Best-first matching at the lowest threshold holds the matching of every higher one as a prefix,
    so one call serves all thresholds.
    """
    found = match(pairs, threshold=thresholds[0], same_label=True)
    group: dict[tuple[int, Any], int] = {}  # (row, class) -> its number
    pred_group = [group.setdefault((r, c), len(group)) for r, c in _labels_of(preds)]
    gt_group = [group.setdefault((r, c), len(group)) for r, c in _labels_of(gts)]
    row_of = np.array([row for row, _ in group], dtype=np.int64)
    num_pred = np.bincount(pred_group, minlength=len(group)) if group else np.empty(0)
    num_gt = np.bincount(gt_group, minlength=len(group)) if group else np.empty(0)
    starts = np.concatenate(([0], np.cumsum(pairs.pred_sizes)))
    hit_group = np.array(pred_group, dtype=np.int64)[starts[found.row] + found.pred]
    total = np.zeros(len(group))
    levels = np.array(RECALLS)
    for threshold in thresholds:
        hits = np.bincount(hit_group[found.iou >= threshold], minlength=len(group))
        reached = np.searchsorted(levels, hits / np.maximum(num_gt, 1), side="right")
        total += hits / np.maximum(num_pred, 1) * (reached / len(levels))
    rows = len(preds)
    classes = np.bincount(row_of, minlength=rows) if group else np.zeros(rows)
    sums = np.bincount(row_of, weights=total, minlength=rows) if group else np.zeros(rows)
    return sums / np.maximum(classes, 1) / len(thresholds)


def _labels_of(rows: list[Detections]):
    """(row, label) of every box; each missing label is a class of its own."""
    for r, row in enumerate(rows):
        for i, label in enumerate(row.labels):
            yield r, i if label is None else label


def _tagged(text: str) -> str:
    content = answer(text, last=True)
    if content is None:
        raise Unscorable("no_answer")
    return content


def read_rows(
    texts: list[str], note: Note, solutions, frames: list[RowFrames], read: Callable[[str], str]
) -> tuple[list[float | None], list[Detections], list[Detections], list[int]]:
    """Values so far, and the detections and row numbers of those still to be scored.

    Predictions are given in the frame of their solution.
    """
    values: list[float | None] = [0.0] * len(texts)
    preds, gts, rows = [], [], []
    known: dict[str, Detections] = {}  # the rows of a group share their solution
    for i, (text, solution, frame) in enumerate(zip(texts, solutions, frames, strict=True)):
        try:
            gt = known.get(solution) if isinstance(solution, str) else None
            if gt is None:
                gt = solution_detections(solution)
                if isinstance(solution, str):
                    known[solution] = gt
            found = read_detections(read(text))
            preds.append(Detections(frame.to_solution(found.boxes), found.labels))
        except BadColumn as fault:
            note(i, f"bad_column: {fault}")
            values[i] = None
            continue
        except Unscorable as fault:
            note(i, str(fault))
            continue
        gts.append(gt)
        rows.append(i)
    return values, preds, gts, rows


def where_empty(score, num_pred, num_gt) -> np.ndarray:
    score = np.where((num_pred == 0) != (num_gt == 0), 0.0, score)
    return np.where((num_pred == 0) & (num_gt == 0), 1.0, score)


def place(values, rows, scores) -> list[float | None]:
    for row, score in zip(rows, scores.tolist(), strict=True):
        values[row] = score
    return values
