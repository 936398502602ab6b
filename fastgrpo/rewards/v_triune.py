"""V-Triune's verifiers (MiniMax-AI/One-RL-to-See-Them-All@39bcf0d): detection and mathematics."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fastgrpo.errors import InputError
from fastgrpo.ops.average_precision import COCO, average_precision
from fastgrpo.rewards import math_pool
from fastgrpo.rewards.boxes import finite_box
from fastgrpo.rewards.detection import (
    MAX_BOXES,
    Detections,
    Overlaps,
    completeness,
    match,
    overlaps,
)
from fastgrpo.rewards.registry import Unscorable, progress, reward
from fastgrpo.rewards.text import MAX_JSON, answer

SOURCE = "MiniMax-AI/One-RL-to-See-Them-All@39bcf0d"
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
RATIOS = ("iou_max_label_first", "iou_max_iou_first", "iou_completeness", "map", "map50", "map75")
# The repository ships no weights (they come with the data set's rows); these are ours.
DEFAULT_RATIO = {"iou_max_label_first": 1.0, "iou_completeness": 0.3}
MAX_MATH = 8192


def dynamic_threshold(step: int, total_steps: int) -> float:
    """0.85 in the first tenth of training, 0.95 to a quarter, then 0.99; ends included."""
    ratio = float(step) / float(total_steps)
    return 0.85 if ratio <= 0.1 else 0.95 if ratio <= 0.25 else 0.99


@reward(
    "v_triune/detection",
    columns=("solution",),
    optional=("det_reward_ratio", "image_grid_thw"),
    upstream_range=(-1.0, 1.0),
    source=SOURCE,
    batched=True,
)
def detection(
    texts,
    note,
    *,
    solution,
    det_reward_ratio=None,
    image_grid_thw=None,
    iou_threshold: float | str = "dynamic",
    ratio: dict[str, float] | None = None,
    normalized: bool = False,
    step: int | None = None,
    total_steps: int | None = None,
    trainer_state=None,
    compat: str,
):
    """Weighted mean of IoU scores and AP, times 0.6^|n_pred - n_gt|.

    Per pair matched one to one with IoU >= epsilon: score = (1 - c) * (sum of IoU / n_gt) + c *
    completeness, c = ratio["iou_completeness"], completeness = 1 - (missed / n_gt + false /
    n_pred) / 2. Pairs are matched label first (each ground truth in order takes the best free
    prediction of its label) or IoU first (best pair first; a wrong label makes its IoU 0). The
    weights of the two and of "map", "map50", "map75" are the row's `det_reward_ratio` or `ratio`.

    `iou_threshold`: epsilon, "average" over 0.5 ... 0.95, 0.99, or "dynamic": `dynamic_threshold`
    of step and total steps, from the settings or the trainer's state. `normalized` maps predicted
    pixels to 0 ... 1000 by the row's `image_grid_thw`.

    Source: One-RL-to-See-Them-All@39bcf0d, `DetectionVerifier.verify_accuracy`. "upstream": the
    IoU-first matching records the last unmatched pair in place of the best one, so two exact boxes
    in swapped order score 0. "fixed": it records the best pair.
    """
    epsilons = _epsilons(iou_threshold, *progress(trainer_state, step, total_steps))
    values: list[float | None] = [0.0] * len(texts)
    read = _read_rows(texts, solution, image_grid_thw if normalized else None, values, note, compat)
    given = det_reward_ratio or [None] * len(texts)
    ratios = [own or ratio or DEFAULT_RATIO for own in given]
    weights = [weights_of(ratios[i]) for i, _, _ in read]
    parts = detection_parts(
        [p for _, p, _ in read], [g for _, _, g in read], weights, epsilons, compat
    )
    for k, (i, _, _) in enumerate(read):
        total = sum(weights[k][key] for key in _SCORES)
        score = sum(weights[k][key] * parts[key][k] for key in _SCORES)
        values[i] = float(score * parts["size_penalty"][k] / total) if total > 0 else 0.0
    return values


_SCORES = ("iou_max_label_first", "iou_max_iou_first", "map", "map50", "map75")


def _epsilons(threshold: float | str, step: int | None, total: int | None) -> tuple[float, ...]:
    if threshold == "average":
        return THRESHOLDS
    if threshold == "dynamic":
        if step is None or not total or total < 0:
            raise InputError(
                "v_triune/detection: the dynamic threshold needs trainer_state, or step and "
                f"total_steps > 0; got step={step}, total_steps={total}"
            )
        return (dynamic_threshold(step, total),)
    if threshold not in THRESHOLDS:
        raise InputError(f"iou_threshold: expected 'dynamic', 'average' or one of {THRESHOLDS}")
    return (float(threshold),)


def weights_of(ratio: dict[str, float]) -> dict[str, float]:
    """Missing weights and those outside [0, 1] are 0, as in the published code."""
    given = {key: (ratio or {}).get(key) or 0.0 for key in RATIOS}
    return {key: float(v) if 0 <= v <= 1 else 0.0 for key, v in given.items()}


def detection_parts(preds, gts, weights, epsilons, compat: str) -> dict[str, np.ndarray]:
    """(rows,) arrays of every score before the size penalty, and the penalty."""
    pairs = overlaps(preds, gts)
    by_gt = overlaps(gts, preds)
    share = np.array([w["iou_completeness"] for w in weights])
    iou_first = _iou_first_bug if compat == "upstream" else _iou_first
    parts = {
        "iou_max_label_first": [_label_first(by_gt, e, share) for e in epsilons],
        "iou_max_iou_first": [iou_first(pairs, e, share) for e in epsilons],
    }
    parts = {key: np.mean(scores, axis=0) for key, scores in parts.items()}
    apart = np.abs(pairs.pred_sizes - pairs.gt_sizes)
    return parts | _average_precisions(preds, gts, pairs) | {"size_penalty": 0.6**apart}


def _average_precisions(preds, gts, pairs: Overlaps) -> dict[str, np.ndarray]:
    per_threshold = average_precision(
        np.concatenate([p.boxes for p in preds] or [np.empty((0, 4))]),
        [label for p in preds for label in p.labels],
        None,
        np.concatenate([g.boxes for g in gts] or [np.empty((0, 4))]),
        [label for g in gts for label in g.labels],
        pairs.pred_sizes.tolist(),
        pairs.gt_sizes.tolist(),
        thresholds=COCO,
        area_range=(0, 1e10),
        per_threshold=True,
    ).numpy()
    known = [not set(p.labels).isdisjoint(g.labels) for p, g in zip(preds, gts, strict=True)]
    table = np.where(np.array(known, dtype=bool)[:, None], per_threshold, 0.0)
    return {"map": table.mean(1), "map50": table[:, 0], "map75": table[:, 5]}


def _score(total, matched, pred_sizes, gt_sizes, share) -> np.ndarray:
    mean_iou = total / np.maximum(gt_sizes, 1)
    whole = completeness(pred_sizes, gt_sizes, matched)
    return mean_iou * (1.0 - share) + whole * share


def _label_first(by_gt: Overlaps, epsilon: float, share) -> np.ndarray:
    found = match(by_gt, method="greedy_rows", threshold=epsilon, same_label=True)
    rows = len(by_gt.gt_sizes)
    total = np.bincount(found.row, weights=found.iou, minlength=rows)
    matched = np.bincount(found.row, minlength=rows)
    return _score(total, matched, by_gt.gt_sizes, by_gt.pred_sizes, share)


def _iou_first(pairs: Overlaps, epsilon: float, share) -> np.ndarray:
    found = match(pairs, threshold=epsilon, same_label=False)
    rows = len(pairs.gt_sizes)
    place = pairs.offsets.numpy()[found.row] + found.pred * pairs.gt_sizes[found.row] + found.gt
    right = np.where(pairs.same_label[place], found.iou, 0.0)
    total = np.bincount(found.row, weights=right, minlength=rows)
    matched = np.bincount(found.row, minlength=rows)
    return _score(total, matched, pairs.pred_sizes, pairs.gt_sizes, share)


def _iou_first_bug(pairs: Overlaps, epsilon: float, share) -> np.ndarray:
    """The published matching: the best IoU that is left, credited to the last pair that is left."""
    totals, matched = np.zeros(len(share)), np.zeros(len(share), dtype=np.int64)
    for row in range(len(share)):
        recorded = last_pair_matches(*row_matrices(pairs, row), epsilon)
        totals[row], matched[row] = sum(iou for _, _, iou in recorded), len(recorded)
    return _score(totals, matched, pairs.pred_sizes, pairs.gt_sizes, share)


def row_matrices(pairs: Overlaps, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(n_pred, n_gt) IoU and label equality of one row."""
    start, end = pairs.offsets[row].item(), pairs.offsets[row + 1].item()
    shape = pairs.pred_sizes[row], pairs.gt_sizes[row]
    return pairs.iou[start:end].reshape(shape), pairs.same_label[start:end].reshape(shape)


def last_pair_matches(iou: np.ndarray, same: np.ndarray, epsilon: float):
    """[(pred, gt, credited IoU)]: pairs are removed from the end, by the maximum before them."""
    best = np.maximum.accumulate(np.maximum.accumulate(iou, axis=0), axis=1)
    recorded = []
    for k in range(min(iou.shape)):
        pred, gt = iou.shape[0] - 1 - k, iou.shape[1] - 1 - k
        if best[pred, gt] < epsilon:
            break
        recorded.append((pred, gt, float(best[pred, gt]) if same[pred, gt] else 0.0))
    return recorded


def label_first_matches(iou: np.ndarray, same: np.ndarray, epsilon: float):
    """[(pred, gt, IoU)]: each ground truth in order takes the best free one of its label."""
    free, recorded = np.ones(len(iou), dtype=bool), []
    for gt in range(iou.shape[1]):
        open_ious = np.where(free & same[:, gt], iou[:, gt], -1.0)
        pred = int(open_ious.argmax()) if len(open_ious) else 0
        if len(open_ious) and open_ious[pred] >= max(epsilon, 0.0):
            recorded.append((pred, gt, float(open_ious[pred])))
            free[pred] = False
    return recorded


def _read_rows(texts, solutions, grids, values, note, compat):
    """(row, prediction, ground truth) of the rows that can be scored."""
    read = []
    for i, (text, solution) in enumerate(zip(texts, solutions, strict=True)):
        truth = extract_boxes(answer_of(solution))
        if truth is None:
            if compat == "fixed":
                note(i, "bad_column: solution has no box")
                values[i] = None
            continue
        try:
            said = extract_boxes(answer_of(text), cap=compat == "fixed")
        except Unscorable as fault:
            note(i, str(fault))
            continue
        if said is None:
            if compat == "fixed":
                note(i, "no_boxes")
            continue
        if grids is not None:
            said = _normalized(said, grids[i], values, i)
        read.append((i, said, truth))
    return read


def _normalized(said: Detections, grid, values, i) -> Detections:
    _, height, width = grid[0] if len(grid) == 1 else grid
    scaled = said.boxes / np.array([width, height, width, height], dtype=np.float64) * 1000.0
    return Detections(np.trunc(scaled), said.labels)


def answer_of(text: str) -> str:
    return (answer(text.strip()) or "").strip().lower()


def extract_boxes(text: str, *, cap: bool = False) -> Detections | None:
    """The usable items of a list in JSON or Python spelling, equal coordinates once.

    Double brackets are single ones, a truncated list is cut after its last whole item, single
    quotes are double and backslashes nothing: as the published code reads. None without any.
    """
    if not text.strip() or len(text) > MAX_JSON:
        return None
    text = text.replace("[[", "[").replace("]]", "]")
    if not text.endswith("]"):
        text = text.rsplit("},", 1)[0] + "}]"
    try:
        items = json.loads(text.replace("'", '"').replace("\\", ""))
    except (ValueError, RecursionError):
        return None
    if not isinstance(items, list):
        return None
    if cap and len(items) > MAX_BOXES:
        raise Unscorable("too_many_boxes")
    unique: dict[tuple, str] = {}
    for item in items:
        if isinstance(item, dict) and _usable(item.get("bbox_2d"), item.get("label")):
            unique.setdefault(tuple(item["bbox_2d"]), item["label"])
    if not unique:
        return None
    return Detections(np.array(list(unique), dtype=np.float64), list(unique.values()))


def _usable(box: Any, label: Any) -> bool:
    if not isinstance(label, str) or not isinstance(box, list) or len(box) != 4:
        return False
    box = [int(v) if isinstance(v, bool) else v for v in box]
    return finite_box(box) and box[0] <= box[2] and box[1] <= box[3]


@reward("v_triune/detection_format", source=SOURCE)
def detection_format(text: str, *, compat: str) -> float:
    """1 when one answer, tags on their own lines, holds a usable box, else 0.

    Source: One-RL-to-See-Them-All@39bcf0d, `DetectionVerifier.verify_format`. "upstream": any
    number of opening tags will do. "fixed": exactly one.
    """
    opened, closed = text.count("\n<answer>\n"), text.count("\n</answer>")
    if closed != 1 or opened == 0 or (compat == "fixed" and opened != 1):
        return 0.0
    return float(extract_boxes(answer_of(text)) is not None)


@reward("v_triune/math_format", source=SOURCE)
def math_format(text: str, *, compat: str) -> float:
    """0.25 for each of the four tags that occurs exactly once with its newlines.

    Source: One-RL-to-See-Them-All@39bcf0d, `MathVerifyVerifier.verify_format`. "fixed" also wants
    the tags in order: 0.25 for each tag up to the first that is out of place.
    """
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    if compat == "upstream":
        return 0.25 * sum(text.count(tag) == 1 for tag in tags)
    score, position = 0.0, -1
    for tag in tags:
        # A newline between two tags may belong to both.
        found = text.find(tag)
        if text.count(tag) == 1 and found > position:
            score, position = score + 0.25, found
    return score


@reward("v_triune/math", columns=("solution",), verifies=True, source=SOURCE)
def math_accuracy(text: str, *, solution, compat: str) -> float:
    """1 when math-verify finds the boxed LaTeX of the lower-cased text equal to the solution.

    Source: One-RL-to-See-Them-All@39bcf0d, `MathVerifyVerifier.verify_accuracy`. "upstream"
    searches the whole text. "fixed" looks at the answer only, when there is one.
    """
    if compat == "fixed":
        content = answer(text, last=True)
        text = text if content is None else content
        if len(text) > MAX_MATH:
            raise Unscorable("answer_too_long")
    return float(math_pool.equal(solution.lower(), text.lower(), style="latex").equal)


@reward("v_triune/total", columns=("solution",), optional=("verifier", "det_reward_ratio",
        "accuracy_ratio", "format_ratio", "image_grid_thw"), upstream_range=(-1.0, 1.0),
        source=SOURCE, batched=True)  # fmt: skip
def total(
    texts,
    note,
    *,
    solution,
    verifier=None,
    det_reward_ratio=None,
    accuracy_ratio=None,
    format_ratio=None,
    image_grid_thw=None,
    iou_threshold: float | str = "dynamic",
    ratio: dict[str, float] | None = None,
    normalized: bool = False,
    step: int | None = None,
    total_steps: int | None = None,
    trainer_state=None,
    compat: str,
):
    """accuracy * a / (a + f) + format * f / (a + f) of the row's verifier.

    `verifier` is "mathverify" or "detection" (default) per row; a and f are the row's
    `accuracy_ratio` and `format_ratio`, 1.0 and 0.1 without them.

    Source: One-RL-to-See-Them-All@39bcf0d, reward_serving_fastapi. Modes as the parts.
    """
    size = len(texts)
    verifier = [kind or "detection" for kind in verifier or [None] * size]
    ratios = [own or ratio or DEFAULT_RATIO for own in det_reward_ratio or [None] * size]
    boxes = [i for i in range(size) if verifier[i] == "detection"]
    grids = None if image_grid_thw is None else [image_grid_thw[i] for i in boxes]
    accuracies: list[float | None] = [None] * size
    scores = detection(
        [texts[i] for i in boxes],
        note,
        solution=[solution[i] for i in boxes],
        det_reward_ratio=[ratios[i] for i in boxes],
        image_grid_thw=grids,
        iou_threshold=iou_threshold if boxes else 0.5,
        normalized=normalized,
        step=step,
        total_steps=total_steps,
        trainer_state=trainer_state,
        compat=compat,
    )
    for i, score in zip(boxes, scores, strict=True):
        accuracies[i] = score
    values: list[float | None] = []
    for i, text in enumerate(texts):
        form = detection_format if verifier[i] == "detection" else math_format
        accuracy = accuracies[i]
        if verifier[i] != "detection":
            accuracy = _math_or_zero(text, solution[i], note, i, compat)
        a = _or(accuracy_ratio, i, 1.0)
        f = _or(format_ratio, i, 0.1)
        mixed = accuracy is not None and (accuracy * a + form(text, compat=compat) * f) / (a + f)
        values.append(None if accuracy is None else mixed)
    return values


def _or(column, i: int, default: float) -> float:
    return default if column is None or column[i] is None else column[i]


def _math_or_zero(text, solution, note, i, compat) -> float:
    try:
        return math_accuracy(text, solution=solution, compat=compat)
    except Unscorable as fault:
        note(i, str(fault))
        return 0.0
