# SPDX-License-Identifier: Apache-2.0
"""V-Triune's verifiers (MiniMax-AI/One-RL-to-See-Them-All@39bcf0d): detection and mathematics."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fastgrpo.errors import InputError
from fastgrpo.ops.average_precision import COCO, average_precision
from fastgrpo.rewards.core.columns import progress
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import answer_box
from fastgrpo.rewards.geometry.matching import Overlaps, completeness, match, overlaps
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.boxes import finite_box
from fastgrpo.rewards.read.faults import BadColumn, Unscorable, short
from fastgrpo.rewards.read.items import MAX_BOXES, MAX_JSON, Detections
from fastgrpo.rewards.read.tags import answer, last_answer

SOURCE = "MiniMax-AI/One-RL-to-See-Them-All@39bcf0d"
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
RATIOS = ("iou_max_label_first", "iou_max_iou_first", "iou_completeness", "map", "map50", "map75")
# The repository ships no weights (they come with the data set's rows); these are ours.
DEFAULT_RATIO = {"iou_max_label_first": 1.0, "iou_completeness": 0.3}


def dynamic_threshold(step: int, total_steps: int) -> float:
    """0.85 in the first tenth of training, 0.95 to a quarter, then 0.99; ends included."""
    ratio = float(step) / float(total_steps)
    return 0.85 if ratio <= 0.1 else 0.95 if ratio <= 0.25 else 0.99


def _detection_truth(*, solution, frames, **columns) -> str:
    truth = _solution(solution)
    items = [
        {"bbox_2d": answer_box(box, frames), "label": label}
        for box, label in zip(truth.boxes.tolist(), truth.labels, strict=True)
    ]
    return f"<think>\nt\n</think>\n<answer>\n{json.dumps(items)}\n</answer>"


@reward(
    "v_triune/detection",
    columns=("solution",),
    optional=("det_reward_ratio", "image_grid_thw"),
    upstream_range=(-1.0, 1.0),
    source=SOURCE,
    batched=True,
    framed=True,
    truth=_detection_truth,
)
def detection(
    texts,
    note,
    *,
    solution,
    frames,
    det_reward_ratio=None,
    iou_threshold: float | str = "dynamic",
    ratio: dict[str, float] | None = None,
    step: int | None = None,
    total_steps: int | None = None,
    trainer_state=None,
):
    """Weighted mean of IoU scores and AP, times 0.6^|n_pred - n_gt|.

    Per pair matched one to one with IoU >= epsilon: score = (1 - c) * (sum of IoU / n_gt) + c *
    completeness, c = ratio["iou_completeness"], completeness = 1 - (missed / n_gt + false /
    n_pred) / 2. Pairs are matched label first (each ground truth in order takes the best free
    prediction of its label) or IoU first (best pair first; a wrong label makes its IoU 0). The
    weights of the two and of "map", "map50", "map75" are the row's `det_reward_ratio` or `ratio`.

    `iou_threshold`: epsilon, "average" over 0.5 ... 0.95, 0.99, or "dynamic": `dynamic_threshold`
    of step and total steps, from the settings or the trainer's state.

    Source: One-RL-to-See-Them-All@39bcf0d, `DetectionVerifier.verify_accuracy`. "upstream": the
    IoU-first matching records the last unmatched pair in place of the best one, so two exact boxes
    in swapped order score 0; with `normalized` predicted boxes are divided by the numbers of
    `image_grid_thw`. "fixed": the best pair is recorded; say answer_frame "seen" and
    solution_frame "thousandths" for what `normalized` is for.
    """
    epsilons = epsilons_of(iou_threshold, *progress(trainer_state, step, total_steps))
    values: list[float | None] = [0.0] * len(texts)
    read = _read_rows(texts, solution, frames, values, note)
    given = det_reward_ratio or [None] * len(texts)
    ratios = [given[i] or ratio or DEFAULT_RATIO for i, _, _ in read]
    scores = detection_scores([r[1] for r in read], [r[2] for r in read], ratios, epsilons)
    for (i, _, _), score in zip(read, scores, strict=True):
        values[i] = score
    return values


_SCORES = ("iou_max_label_first", "iou_max_iou_first", "map", "map50", "map75")


def epsilons_of(threshold: float | str, step: int | None, total: int | None) -> tuple[float, ...]:
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


def detection_scores(preds, gts, ratios, epsilons, iou_first=None) -> list[float]:
    """The weighted mean of `detection_parts` times the size penalty, one score per row."""
    weights = [weights_of(ratio) for ratio in ratios]
    parts = detection_parts(preds, gts, weights, epsilons, iou_first or _iou_first)
    scores = []
    for k, weight in enumerate(weights):
        total = sum(weight[key] for key in _SCORES)
        score = sum(weight[key] * parts[key][k] for key in _SCORES)
        scores.append(float(score * parts["size_penalty"][k] / total) if total > 0 else 0.0)
    return scores


def detection_parts(preds, gts, weights, epsilons, iou_first) -> dict[str, np.ndarray]:
    """(rows,) arrays of every score before the size penalty, and the penalty."""
    pairs = overlaps(preds, gts)
    by_gt = overlaps(gts, preds)
    share = np.array([w["iou_completeness"] for w in weights])
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


def pair_score(total, matched, pred_sizes, gt_sizes, share) -> np.ndarray:
    mean_iou = total / np.maximum(gt_sizes, 1)
    whole = completeness(pred_sizes, gt_sizes, matched)
    return mean_iou * (1.0 - share) + whole * share


def _label_first(by_gt: Overlaps, epsilon: float, share) -> np.ndarray:
    found = match(by_gt, method="greedy_rows", threshold=epsilon, same_label=True)
    rows = len(by_gt.gt_sizes)
    total = np.bincount(found.row, weights=found.iou, minlength=rows)
    matched = np.bincount(found.row, minlength=rows)
    return pair_score(total, matched, by_gt.gt_sizes, by_gt.pred_sizes, share)


def _iou_first(pairs: Overlaps, epsilon: float, share) -> np.ndarray:
    found = match(pairs, threshold=epsilon, same_label=False)
    rows = len(pairs.gt_sizes)
    place = pairs.offsets.numpy()[found.row] + found.pred * pairs.gt_sizes[found.row] + found.gt
    right = np.where(pairs.same_label[place], found.iou, 0.0)
    total = np.bincount(found.row, weights=right, minlength=rows)
    matched = np.bincount(found.row, minlength=rows)
    return pair_score(total, matched, pairs.pred_sizes, pairs.gt_sizes, share)


def _read_rows(texts, solutions, frames, values, note):
    """(row, prediction, ground truth) of the rows that can be scored."""
    read = []
    for i, (text, solution, frame) in enumerate(zip(texts, solutions, frames, strict=True)):
        try:
            truth = _solution(solution)
            said = extract_boxes(answer_of(text), cap=True)
            if said is None:
                raise Unscorable("no_boxes")
            read.append((i, Detections(frame.to_solution(said.boxes), said.labels), truth))
        except BadColumn as fault:
            note(i, f"bad_column: {fault}")
            values[i] = None
        except Unscorable as fault:
            note(i, str(fault))
    return read


def _solution(solution: Any) -> Detections:
    text = solution if isinstance(solution, str) else f"<answer>{json.dumps(solution)}</answer>"
    truth = extract_boxes(answer_of(text))
    if truth is None:
        raise BadColumn("solution has no box")
    return truth


def answer_of(text: str) -> str:
    """The first answer in lower case, "" without one."""
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
def detection_format(text: str) -> float:
    """1 when one answer, tags on their own lines, holds a usable box, else 0.

    Source: One-RL-to-See-Them-All@39bcf0d, `DetectionVerifier.verify_format`. "upstream": any
    number of opening tags will do. "fixed": exactly one.
    """
    if text.count("\n</answer>") != 1 or text.count("\n<answer>\n") != 1:
        return 0.0
    return float(extract_boxes(answer_of(text)) is not None)


TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


@reward("v_triune/math_format", source=SOURCE)
def math_format(text: str) -> float:
    """0.25 for each of the four tags that occurs exactly once with its newlines.

    Source: One-RL-to-See-Them-All@39bcf0d, `MathVerifyVerifier.verify_format`. "fixed" also wants
    the tags in order: 0.25 for each tag up to the first that is out of place.
    """
    score, position = 0.0, -1
    for tag in TAGS:
        # A newline between two tags may belong to both.
        found = text.find(tag)
        if text.count(tag) == 1 and found > position:
            score, position = score + 0.25, found
    return score


@reward("v_triune/math", columns=("solution",), verifies=True, source=SOURCE,
        truth=lambda *, solution, **columns: f"<answer>\\boxed{{{solution}}}</answer>")  # fmt: skip
def math_accuracy(text: str, *, solution: str) -> float:
    """1 when math-verify finds the boxed LaTeX of the lower-cased text equal to the solution.

    Source: One-RL-to-See-Them-All@39bcf0d, `MathVerifyVerifier.verify_accuracy`. "upstream"
    searches the whole text. "fixed" looks at the answer only, when there is one.
    """
    said = short(last_answer(text))
    return float(math_pool.equal(solution.lower(), said.lower(), style="latex").equal)


@reward("v_triune/total", columns=("solution",), optional=("verifier", "det_reward_ratio",
        "accuracy_ratio", "format_ratio", "image_grid_thw"), upstream_range=(-1.0, 1.0),
        source=SOURCE, batched=True, framed=True)  # fmt: skip
def total(
    texts,
    note,
    *,
    solution,
    frames,
    verifier=None,
    det_reward_ratio=None,
    accuracy_ratio=None,
    format_ratio=None,
    iou_threshold: float | str = "dynamic",
    ratio: dict[str, float] | None = None,
    step: int | None = None,
    total_steps: int | None = None,
    trainer_state=None,
):
    """accuracy * a / (a + f) + format * f / (a + f) of the row's verifier.

    `verifier` is "mathverify" or "detection" (default) per row; a and f are the row's
    `accuracy_ratio` and `format_ratio`, 1.0 and 0.1 without them.

    Source: One-RL-to-See-Them-All@39bcf0d, reward_serving_fastapi. Modes as the parts.
    """
    size = len(texts)
    verifier = [kind or "detection" for kind in verifier or [None] * size]
    boxes = [i for i in range(size) if verifier[i] == "detection"]
    accuracies: list[float | None] = [None] * size
    scores = detection(
        [texts[i] for i in boxes],
        note,
        solution=[solution[i] for i in boxes],
        frames=[frames[i] for i in boxes],
        det_reward_ratio=det_reward_ratio and [det_reward_ratio[i] for i in boxes],
        iou_threshold=iou_threshold if boxes else 0.5,
        ratio=ratio,
        step=step,
        total_steps=total_steps,
        trainer_state=trainer_state,
    )
    for i, score in zip(boxes, scores, strict=True):
        accuracies[i] = score
    for i in set(range(size)) - set(boxes):
        accuracies[i] = _math_or_zero(texts[i], solution[i], note, i)
    values: list[float | None] = []
    for i, (text, accuracy) in enumerate(zip(texts, accuracies, strict=True)):
        form = detection_format if verifier[i] == "detection" else math_format
        share = _or(accuracy_ratio, i, 1.0), _or(format_ratio, i, 0.1)
        values.append(None if accuracy is None else mixed(accuracy, form(text), *share))
    return values


def mixed(accuracy: float, form: float, a: float, f: float) -> float:
    """accuracy * a / (a + f) + format * f / (a + f)."""
    return (accuracy * a + form * f) / (a + f)


def _or(column, i: int, default: float) -> float:
    return default if column is None or column[i] is None else column[i]


def _math_or_zero(text, solution, note, i) -> float:
    try:
        return math_accuracy(text, solution=solution)
    except Unscorable as fault:
        note(i, str(fault))
        return 0.0
