"""VLM-R1's rewards for detection: mAP, AP50, odLength, weighted sum (om-ai-lab/VLM-R1@90052f4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from fastgrpo.ops.average_precision import COCO, RECALLS, average_precision
from fastgrpo.rewards.detection import (
    EMPTY,
    Detections,
    Overlaps,
    completeness,
    match,
    overlaps,
    read_detections,
)
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import MAX_JSON, answer, clean_text, fenced_json
from fastgrpo.rewards.vlm_r1 import SOURCE

Note = Callable[[int, str], None]
# COCO's stats[0], stats[1], stats[2]: all thresholds, 0.50, 0.75.
STATS = (COCO, COCO[:1], COCO[5:6])


@reward(
    "vlm_r1/map",
    columns=("solution",),
    upstream_range=(-1.0, 1.0),
    source=SOURCE,
    batched=True,
    presets={"vlm_r1/map50": {"score_type": 1}},
)
def map_reward(
    texts: list[str], note: Note, *, solution, score_type: int = 0, compat: str
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
    if compat == "upstream":
        return [upstream_map(t, s, score_type, False) for t, s in zip(texts, solution, strict=True)]
    return _fixed_map(texts, solution, note, score_type, length=False, tags=False)


@reward(
    "vlm_r1/od_ap",
    columns=("solution",),
    upstream_range=(-1.0, 1.0),
    source=SOURCE,
    batched=True,
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
    score_type: int = 0,
    length: bool = False,
    compat: str,
) -> list[float | None]:
    """`vlm_r1/map` of the last `<answer>`; times min(1, n_gt / n_pred) with `length=True`.

    No answer gives 0; "None" in answer and solution gives 1.

    Source: om-ai-lab/VLM-R1@90052f4, `od_reward`, `odLength_reward`. "upstream": as `vlm_r1/map`,
    and where the solution is None any text without a fenced block gives 1. "fixed": as
    `vlm_r1/map`; a solution of None wants the answer None or an empty list.
    """
    if compat == "upstream":
        rows = zip(texts, solution, strict=True)
        return [_upstream_od(t, s, score_type, length) for t, s in rows]
    return _fixed_map(texts, solution, note, score_type, length=length, tags=True)


@reward("vlm_r1/weighted_sum", columns=("solution",), source=SOURCE, batched=True)
def weighted_sum(
    texts: list[str],
    note: Note,
    *,
    solution,
    iou_threshold: float = 0.5,
    alpha: float = 0.7,
    beta: float = 0.0,
    gamma: float = 0.3,
    compat: str,
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
    weights = (alpha, beta, gamma)
    if compat == "upstream":
        cleaned = [(clean_text(t), clean_text(s)) for t, s in zip(texts, solution, strict=True)]
        return [
            float(t == "none") if s == "none" else detection_score(t, s, iou_threshold, *weights)
            for t, s in cleaned
        ]
    values, preds, gts, rows = read_rows(texts, solution, note, _last_answer_or_all)
    pairs = overlaps(preds, gts, same=folded)
    found = match(pairs, threshold=iou_threshold, same_label=True)
    num_pred, num_gt = pairs.pred_sizes, pairs.gt_sizes
    matched = np.bincount(found.row, minlength=len(rows))
    ious = np.bincount(found.row, weights=found.iou, minlength=len(rows))
    position, label = ious / np.maximum(num_gt, 1), matched / np.maximum(num_gt, 1)
    whole = completeness(num_pred, num_gt, matched)
    score = (alpha * position + beta * label + gamma * whole) / sum(weights)
    return place(values, rows, where_empty(score, num_pred, num_gt))


def folded(label: str) -> str:
    return label.strip().lower()


def _fixed_map(texts, solution, note, score_type, *, length, tags) -> list[float | None]:
    read = _last_answer if tags else str
    values, preds, gts, rows = read_rows(texts, solution, note, read)
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


def _last_answer(text: str) -> str:
    content = answer(text, last=True)
    if content is None:
        raise Unscorable("no_answer")
    return content


def _last_answer_or_all(text: str) -> str:
    content = answer(text, last=True)
    return text if content is None else content


def read_rows(texts, solutions, note: Note, read):
    """Values so far, and the detections and row numbers of those still to be scored."""
    values: list[float | None] = [0.0] * len(texts)
    preds, gts, rows = [], [], []
    known: dict[str, Detections] = {}  # the rows of a group share their solution
    for i, (text, solution) in enumerate(zip(texts, solutions, strict=True)):
        try:
            gt = known.get(solution) if isinstance(solution, str) else None
            if gt is None:
                gt = read_solution(solution)
                if isinstance(solution, str):
                    known[solution] = gt
        except BadColumn as fault:
            note(i, f"bad_column: {fault}")
            values[i] = None
            continue
        try:
            preds.append(read_detections(read(text)))
        except Unscorable as fault:
            note(i, str(fault))
            continue
        gts.append(gt)
        rows.append(i)
    return values, preds, gts, rows


def read_solution(solution: Any) -> Detections:
    """Ground truth from a tagged or fenced string, or from a list of items as it is."""
    if solution is None:
        return EMPTY
    try:
        if not isinstance(solution, str):
            solution = json.dumps(list(solution))
        gt = read_detections(_last_answer_or_all(solution))
    except (Unscorable, TypeError, ValueError) as fault:
        raise BadColumn(f"solution: {fault}") from None
    if None in gt.labels or not np.isfinite(gt.boxes).all():
        raise BadColumn("solution: an item lacks box or label")
    if (gt.boxes[:, :2] > gt.boxes[:, 2:]).any():
        raise BadColumn("solution: a box is reversed")
    return gt


def where_empty(score, num_pred, num_gt) -> np.ndarray:
    score = np.where((num_pred == 0) != (num_gt == 0), 0.0, score)
    return np.where((num_pred == 0) & (num_gt == 0), 1.0, score)


def place(values, rows, scores) -> list[float | None]:
    for row, score in zip(rows, scores.tolist(), strict=True):
        values[row] = score
    return values


# The published behaviour, one row at a time.


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


def _upstream_od(text: str, solution: str, score_type: int, length: bool) -> float:
    content, truth = answer(text, last=True), answer(solution)
    if content is None:
        return 0.0
    content, truth = content.strip(), truth if truth is None else truth.strip()
    if truth == content == "None":
        return 1.0
    if truth is None:
        raise TypeError("expected string or bytes-like object, got 'NoneType'")
    return upstream_map(content, truth, score_type, length)


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
