# SPDX-License-Identifier: Apache-2.0
"""`three_d_r1` as published (AIGeeksGroup/3D-R1@767a5e2)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.systems import three_d_r1 as fixed


@published(fixed.format_reward)
def format_reward(text: str) -> float:
    """The lengths include the tags."""
    return fixed.rated_blocks(text, True)


@published(fixed.perception)
def perception(text: str, *, gt_boxes) -> float:
    """Several predictions may take the same true box, and missed ones cost nothing."""
    said, truth = fixed.read_boxes(text), [fixed.corners(box) for box in gt_boxes]
    if not said or not truth:
        return 0.0
    return sum(max(fixed.iou_3d(box, gt) for gt in truth) for box in said) / len(said)


@published(fixed.total)
def total(
    text: str,
    *,
    gt_boxes,
    solution: str | None = None,
    similarity: fixed.Similarity | None = None,
) -> float:
    """The same sum of the published parts."""
    score = 0.3 * format_reward(text) + 0.4 * perception(text, gt_boxes=gt_boxes)
    return score + fixed.meaning(text, solution, similarity)
