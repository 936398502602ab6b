# SPDX-License-Identifier: Apache-2.0
"""Visual-RFT's rewards (Liuziyu77/Visual-RFT@9486633): detection, classification, grounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import answer_box, thought, written_box
from fastgrpo.rewards.geometry.matching import match, overlaps
from fastgrpo.rewards.geometry.overlap import giou
from fastgrpo.rewards.read.boxes import first_box, ordered_box
from fastgrpo.rewards.read.faults import BadColumn, Unscorable, short
from fastgrpo.rewards.read.items import MAX_BOXES, Detections, load_list
from fastgrpo.rewards.read.tags import answer_or_all, think_then_answer

SOURCE = "Liuziyu77/Visual-RFT@9486633"


def _detection_truth(*, solution, frames, **columns) -> str:
    boxes = _solution(solution).found.boxes.tolist()
    return thought(str([{"Position": answer_box(b, frames), "Confidence": 1.0} for b in boxes]))


def _grounding_truth(*, solution, frames, **columns) -> str:
    return thought(written_box(_solution_box(solution), frames))


@reward("visual_rft/iou", columns=("solution",), source=SOURCE, batched=True, framed=True,
        truth=_detection_truth)  # fmt: skip
def iou_reward(texts, note, *, solution, frames, iou_threshold: float = 0.5):
    """Sum of IoU of the matched boxes / max(n_gt, n_pred), in [0, 1].

    The answer lists {'Position': [x1, y1, x2, y2], 'Confidence': c}. By falling confidence each
    box takes the free ground truth it overlaps most, if IoU > `iou_threshold`. Boxes with equal
    coordinates count once.

    Source: Liuziyu77/Visual-RFT@9486633, `accuracy_reward_iou`. "upstream": math-verify is asked
    first on the whole texts; it reads the second coordinate of the first box, so an equal y1 gives
    1.0 whatever the IoU, and any fault gives 0. "fixed": no such question; a box that is no box
    counts as unmatched, and a bad solution gives None.
    """
    return _detection(texts, note, solution, frames, iou_threshold, _iou_scores)


@reward("visual_rft/confidence", columns=("solution",), source=SOURCE, batched=True, framed=True,
        truth=_detection_truth)  # fmt: skip
def confidence_reward(texts, note, *, solution, frames, iou_threshold: float = 0.5):
    """Mean over the boxes of c if matched, else 1 - c; matching as in `visual_rft/iou`.

    Source: Liuziyu77/Visual-RFT@9486633, `accuracy_reward_confidence`. Modes as `visual_rft/iou`;
    "fixed" also wants confidences in [0, 1].
    """
    return _detection(texts, note, solution, frames, iou_threshold, _confidence_scores)


@reward("visual_rft/format", source=SOURCE)
def format_reward(text: str) -> float:
    """1 when the text is `<think>...</think> <answer>...</answer>`; modes as `vlm_r1/format`."""
    return float(think_then_answer(text) is not None)


@reward("visual_rft/classification", columns=("solution",), source=SOURCE,
        truth=lambda *, solution, **columns: thought(answer_or_all(solution)))  # fmt: skip
def classification(text: str, *, solution: str) -> float:
    """1 when answer and solution name the same class, blanks, underscores and case aside.

    Source: Liuziyu77/Visual-RFT@9486633, `grpo_classification.accuracy_reward`. "upstream":
    math-verify first, then substring either way, so an empty answer or one that lists every class
    gives 1. "fixed": equality.
    """
    if not isinstance(solution, str) or not solution.strip():
        raise BadColumn("solution is not text")
    said = class_name(short(answer_or_all(text).strip()))
    return float(said == class_name(answer_or_all(solution).strip()))


def class_name(text: str) -> str:
    """A class without blanks, underscores and case."""
    return text.replace(" ", "").replace("_", "").lower()


@reward("visual_rft/giou", columns=("solution",), range=(0.0, 2.0), source=SOURCE, framed=True,
        truth=_grounding_truth)  # fmt: skip
def giou_reward(text: str, *, solution: str, frames) -> float:
    """1 + GIoU of the box "(x1,y1),(x2,y2)" of the answer with the solution's, in [0, 2].

    Source: Liuziyu77/Visual-RFT@9486633, `grpo_lisa.accuracy_reward`. "upstream": math-verify
    first (1.0 when it finds the texts equal), 2.0 for equal strings, and of several boxes the
    first two top-left corners are taken for one box. "fixed": the first box, in brackets too; a
    reversed one gives 0, a bad solution None.
    """
    truth = _solution_box(solution)
    said = first_box(short(answer_or_all(text)))
    if said is None:
        raise Unscorable("no_box")
    said = frames.to_solution(said)
    if not ordered_box(said):
        raise Unscorable("reversed_box")
    return 1 + giou(truth, said)


def _solution_box(solution: Any) -> list[float]:
    box = first_box(answer_or_all(solution)) if isinstance(solution, str) else solution
    if not ordered_box(box):
        raise BadColumn("solution has no box")
    return list(box)


class _Answer(NamedTuple):
    found: Detections
    confidence: np.ndarray


def _detection(texts, note, solutions, frames, threshold, score) -> list[float | None]:
    """Both detection rewards: read, match, score."""
    values: list[float | None] = [0.0] * len(texts)
    said, truths, rows = [], [], []
    for i, (text, solution, frame) in enumerate(zip(texts, solutions, frames, strict=True)):
        try:
            truth = _solution(solution)
            found, confidence = _read(text, confidence=True)
            found = Detections(frame.to_solution(found.boxes), found.labels)
        except BadColumn as fault:
            note(i, f"bad_column: {fault}")
            values[i] = None
            continue
        except Unscorable as fault:
            note(i, str(fault))
            continue
        said.append(_Answer(found, confidence))
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


def _solution(solution: Any) -> _Answer:
    try:
        text = solution if isinstance(solution, str) else str(list(solution))
        return _read(text, confidence=False)
    except (Unscorable, TypeError) as fault:
        raise BadColumn(f"solution: {fault}") from None


def _read(text: str, *, confidence: bool) -> _Answer:
    """Boxes by falling confidence, equal coordinates once."""
    items = load_list(answer_or_all(text).strip().replace("'", '"'))
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
