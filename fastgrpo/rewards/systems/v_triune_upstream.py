# SPDX-License-Identifier: Apache-2.0
"""`v_triune` as published (MiniMax-AI/One-RL-to-See-Them-All@39bcf0d)."""

from __future__ import annotations

import numpy as np

from fastgrpo.rewards.core.columns import progress
from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.geometry.matching import Overlaps
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.items import Detections
from fastgrpo.rewards.systems import v_triune as fixed


@published(fixed.detection)
def detection(
    text: str,
    *,
    solution: str,
    det_reward_ratio=None,
    image_grid_thw=None,
    iou_threshold: float | str = "dynamic",
    ratio: dict[str, float] | None = None,
    normalized: bool = False,
    step: int | None = None,
    total_steps: int | None = None,
    trainer_state=None,
) -> float:
    """As repaired, but for the IoU-first matching; what cannot be read is 0."""
    epsilons = fixed.epsilons_of(iou_threshold, *progress(trainer_state, step, total_steps))
    said, truth = (fixed.extract_boxes(fixed.answer_of(side)) for side in (text, solution))
    if said is None or truth is None:
        return 0.0
    if normalized and image_grid_thw is not None:
        said = _normalized(said, image_grid_thw)
    ratio = det_reward_ratio or ratio or fixed.DEFAULT_RATIO
    return fixed.detection_scores([said], [truth], [ratio], epsilons, iou_first_bug)[0]


def _normalized(said: Detections, grid) -> Detections:
    _, height, width = grid[0] if len(grid) == 1 else grid
    scaled = said.boxes / np.array([width, height, width, height], dtype=np.float64) * 1000.0
    return Detections(np.trunc(scaled), said.labels)


def iou_first_bug(pairs: Overlaps, epsilon: float, share) -> np.ndarray:
    """The published matching: the best IoU that is left, credited to the last pair that is left."""
    totals, matched = np.zeros(len(share)), np.zeros(len(share), dtype=np.int64)
    for row in range(len(share)):
        recorded = last_pair_matches(*row_matrices(pairs, row), epsilon)
        totals[row], matched[row] = sum(iou for _, _, iou in recorded), len(recorded)
    return fixed.pair_score(totals, matched, pairs.pred_sizes, pairs.gt_sizes, share)


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


@published(fixed.detection_format)
def detection_format(text: str) -> float:
    """Any number of opening tags will do."""
    if text.count("\n</answer>") != 1 or "\n<answer>\n" not in text:
        return 0.0
    return float(fixed.extract_boxes(fixed.answer_of(text)) is not None)


@published(fixed.math_format)
def math_format(text: str) -> float:
    """The tags may come in any order."""
    return 0.25 * sum(text.count(tag) == 1 for tag in fixed.TAGS)


@published(fixed.math_accuracy)
def math_accuracy(text: str, *, solution: str) -> float:
    """math-verify on the whole text."""
    return float(math_pool.equal(solution.lower(), text.lower(), style="latex").equal)


@published(fixed.total)
def total(
    text: str,
    *,
    solution: str,
    verifier: str | None = None,
    accuracy_ratio: float | None = None,
    format_ratio: float | None = None,
    det_reward_ratio=None,
    image_grid_thw=None,
    iou_threshold: float | str = "dynamic",
    ratio: dict[str, float] | None = None,
    normalized: bool = False,
    step: int | None = None,
    total_steps: int | None = None,
    trainer_state=None,
) -> float:
    """The published parts in the repaired mixture."""
    if (verifier or "detection") == "detection":
        form = detection_format(text)
        accuracy = detection(
            text,
            solution=solution,
            det_reward_ratio=det_reward_ratio,
            image_grid_thw=image_grid_thw,
            iou_threshold=iou_threshold,
            ratio=ratio,
            normalized=normalized,
            step=step,
            total_steps=total_steps,
            trainer_state=trainer_state,
        )
    else:
        accuracy, form = math_accuracy(text, solution=solution), math_format(text)
    a = 1.0 if accuracy_ratio is None else accuracy_ratio
    return fixed.mixed(accuracy, form, a, 0.1 if format_ratio is None else format_ratio)
