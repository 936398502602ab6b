"""Visual-RFT's rewards (Liuziyu77/Visual-RFT@9486633): detection, classification, grounding."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from fastgrpo.rewards import math_pool
from fastgrpo.rewards.boxes import giou, iou_continuous, ordered_box
from fastgrpo.rewards.detection import MAX_BOXES, Detections, match, overlaps
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import MAX_JSON, answer, loads, one_line_answer, pattern, think_answer
from fastgrpo.rewards.vlm_r1 import think_then_answer

SOURCE = "Liuziyu77/Visual-RFT@9486633"
MAX_ANSWER = 8192


def _short(text: str) -> str:
    if len(text) > MAX_ANSWER:
        raise Unscorable("answer_too_long")
    return text


@reward("visual_rft/iou", columns=("solution",), source=SOURCE, batched=True)
def iou_reward(texts, note, *, solution, iou_threshold: float = 0.5, compat: str):
    """Sum of IoU of the matched boxes / max(n_gt, n_pred), in [0, 1].

    The answer lists {'Position': [x1, y1, x2, y2], 'Confidence': c}. By falling confidence each
    box takes the free ground truth it overlaps most, if IoU > `iou_threshold`. Boxes with equal
    coordinates count once.

    Source: Liuziyu77/Visual-RFT@9486633, `accuracy_reward_iou`. "upstream": math-verify is asked
    first on the whole texts; it reads the second coordinate of the first box, so an equal y1 gives
    1.0 whatever the IoU, and any fault gives 0. "fixed": no such question; a box that is no box
    counts as unmatched, and a bad solution gives None.
    """
    if compat == "upstream":
        rows = zip(texts, solution, strict=True)
        return [_upstream(text, truth, iou_threshold, _iou_of) for text, truth in rows]
    return _detection(texts, note, solution, iou_threshold, _iou_scores)


@reward("visual_rft/confidence", columns=("solution",), source=SOURCE, batched=True)
def confidence_reward(texts, note, *, solution, iou_threshold: float = 0.5, compat: str):
    """Mean over the boxes of c if matched, else 1 - c; matching as in `visual_rft/iou`.

    Source: Liuziyu77/Visual-RFT@9486633, `accuracy_reward_confidence`. Modes as `visual_rft/iou`;
    "fixed" also wants confidences in [0, 1].
    """
    if compat == "upstream":
        rows = zip(texts, solution, strict=True)
        return [_upstream(text, truth, iou_threshold, _confidence_of) for text, truth in rows]
    return _detection(texts, note, solution, iou_threshold, _confidence_scores)


@reward("visual_rft/format", source=SOURCE)
def format_reward(text: str, *, compat: str) -> float:
    """1 when the text is `<think>...</think> <answer>...</answer>`; modes as `vlm_r1/format`."""
    if compat == "upstream":
        return float(think_answer(text))
    return float(think_then_answer(text) is not None)


@reward("visual_rft/classification", columns=("solution",), verifies=True, source=SOURCE)
def classification(text: str, *, solution, compat: str) -> float:
    """1 when answer and solution name the same class, blanks, underscores and case aside.

    Source: Liuziyu77/Visual-RFT@9486633, `grpo_classification.accuracy_reward`. "upstream":
    math-verify first, then substring either way, so an empty answer or one that lists every class
    gives 1. "fixed": equality.
    """
    if compat == "upstream":
        if math_pool.equal(text, solution).equal:
            return 1.0
        truth, said = _class_name(one_line_answer(solution)), _class_name(one_line_answer(text))
        return float(truth in said or said in truth)
    content = answer(text)
    said = _class_name(_short((text if content is None else content).strip()))
    if not isinstance(solution, str) or not solution.strip():
        raise BadColumn("solution is not text")
    content = answer(solution)
    return float(said == _class_name((solution if content is None else content).strip()))


def _class_name(text: str) -> str:
    return text.replace(" ", "").replace("_", "").lower()


_POINT = r"\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)"
_CORNERS = rf"{_POINT}\s*,\s*{_POINT}"


@reward("visual_rft/giou", columns=("solution",), range=(0.0, 2.0), verifies=True, source=SOURCE)
def giou_reward(text: str, *, solution, compat: str) -> float:
    """1 + GIoU of the box "(x1,y1),(x2,y2)" of the answer with the solution's, in [0, 2].

    Source: Liuziyu77/Visual-RFT@9486633, `grpo_lisa.accuracy_reward`. "upstream": math-verify
    first (1.0 when it finds the texts equal), 2.0 for equal strings, and of several boxes the
    first two top-left corners are taken for one box. "fixed": the first box; a reversed one
    gives 0, a bad solution None.
    """
    if compat == "upstream":
        if math_pool.equal(text, solution).equal:
            return 1.0
        content = answer(text)
        said = (text if content is None else content).strip()
        truth = one_line_answer(solution)
        if said == truth:
            return 2.0
        try:
            return giou(_merged_corners(truth), _merged_corners(said)) + 1
        except (IndexError, ValueError, ArithmeticError):
            return 0.0
    content = answer(text)
    said = _first_box(_short(text if content is None else content))
    content = answer(solution)
    truth = _first_box(solution if content is None else content)
    if not ordered_box(truth):
        raise BadColumn("solution has no box")
    if not ordered_box(said):
        raise Unscorable("no_box" if said is None else "reversed_box")
    return 1 + giou(truth, said)


def _merged_corners(text: str) -> list[float]:
    first_two = islice(pattern(_CORNERS).finditer(text), 2)  # no further one is looked at
    found = [[int(n) / 1000 for n in m.groups()] for m in first_two]
    corners = [b[:2] for b in found] + [b[2:] for b in found]
    return corners[0] + corners[1]


def _first_box(text: str) -> list[float] | None:
    found = pattern(_CORNERS).search(text)
    return [float(number[:12]) for number in found.groups()] if found else None


class _Answer(NamedTuple):
    found: Detections
    confidence: np.ndarray


def _detection(texts, note, solutions, threshold, score):
    """Both detection rewards in "fixed" mode: read, match, score."""
    values: list[float | None] = [0.0] * len(texts)
    said, truths, rows = [], [], []
    for i, (text, solution) in enumerate(zip(texts, solutions, strict=True)):
        try:
            truth = _read(solution, confidence=False)
        except (Unscorable, TypeError) as fault:
            note(i, f"bad_column: solution: {fault}")
            values[i] = None
            continue
        try:
            said.append(_read(text, confidence=True))
        except Unscorable as fault:
            note(i, str(fault))
            continue
        truths.append(truth.found)
        rows.append(i)
    pairs = overlaps([s.found for s in said], truths)
    above = float(np.nextafter(threshold, 2.0))
    found = match(pairs, method="greedy_rows", threshold=above, same_label=False)
    for row, value in zip(rows, score(said, pairs, found).tolist(), strict=True):
        values[row] = value
    return values


def _iou_scores(said, pairs, found) -> np.ndarray:
    total = np.bincount(found.row, weights=found.iou, minlength=len(said))
    return total / np.maximum(1, np.maximum(pairs.pred_sizes, pairs.gt_sizes))


def _confidence_scores(said, pairs, found) -> np.ndarray:
    scores = np.zeros(len(said))
    for row, one in enumerate(said):
        matched = np.zeros(len(one.confidence), dtype=bool)
        matched[found.pred[found.row == row]] = True
        right = np.where(matched, one.confidence, 1 - one.confidence)
        scores[row] = right.mean() if len(right) else 0.0
    return scores


def _read(text: str, *, confidence: bool) -> _Answer:
    """Boxes by falling confidence, equal coordinates once."""
    content = answer(text)
    items = loads((text if content is None else content).strip().replace("'", '"'))
    if not isinstance(items, list):
        raise Unscorable("not_a_list")
    if len(items) > MAX_BOXES:
        raise Unscorable("too_many_boxes")
    unique: dict[Any, tuple[Any, float]] = {}
    for i, item in enumerate(items):
        box = item.get("Position") if isinstance(item, dict) else None
        usable = ordered_box(box)
        sure = item.get("Confidence", 0.0 if confidence else 1.0) if usable else 0.0
        if type(sure) not in (int, float) or not 0 <= sure <= 1:
            raise Unscorable("bad_confidence")
        unique.setdefault(tuple(box) if usable else i, (box if usable else [np.nan] * 4, sure))
    kept = sorted(unique.values(), key=lambda pair: -pair[1])
    boxes = np.array([box for box, _ in kept], dtype=np.float64).reshape(-1, 4)
    return _Answer(Detections(boxes, [""] * len(kept)), np.array([sure for _, sure in kept]))


# The published behaviour, one row at a time.


def _upstream(text: str, solution: str, threshold: float, score) -> float:
    if math_pool.equal(text, solution).equal:
        return 1.0
    try:
        said = one_line_answer(text).replace("[[", "[").replace("]]", "]").replace("\n", "")
        preds = _upstream_items(f"<answer>{said}</answer>")
        truths = _upstream_items(solution.strip())
        if preds is None or type(preds[0]) is not dict:
            return 0.0
        results = _upstream_match(truths, preds, threshold)
        return min(max(score(results, len(truths)), 0.0), 1.0)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError):
        return 0.0


def _upstream_items(text: str) -> list[Any] | None:
    if "<answer>" not in text:
        return None
    closed = text.find("</answer>")
    content = text[text.find("<answer>") + len("<answer>") : None if closed < 0 else closed]
    if not content.endswith("]"):
        content = content.rsplit("},", 1)[0] + "}]"
    if len(content) > MAX_JSON:
        return None
    try:
        return json.loads(content.replace("'", '"'))
    except json.JSONDecodeError:
        return None


def _upstream_match(truths, preds, threshold) -> list[tuple[float, float]]:
    """(IoU or 0, confidence) by falling confidence."""
    unique = {tuple(pred["Position"]): pred for pred in reversed(preds)}
    kept = sorted(reversed(unique.values()), key=lambda pred: pred["Confidence"], reverse=True)
    free, results = list(range(len(truths))), []
    for pred in kept:
        best, taken = 0, None
        for i in free:
            x1, y1, x2, y2 = truths[i]["Position"]
            u1, v1, u2, v2 = pred["Position"]
            iou = iou_continuous((x1, y1, x2, y2), (u1, v1, u2, v2))
            if iou > best:
                best, taken = iou, i
        if best > threshold:
            free.remove(taken)
        results.append((best if best > threshold else 0, pred["Confidence"]))
    return results


def _iou_of(results, num_gt: int) -> float:
    return sum(iou for iou, _ in results) / max(num_gt, len(results))


def _confidence_of(results, num_gt: int) -> float:
    return sum(c if iou else 1 - c for iou, c in results) / len(results)
