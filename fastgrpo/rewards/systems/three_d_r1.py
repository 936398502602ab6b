# SPDX-License-Identifier: Apache-2.0
"""3D-R1's rewards (AIGeeksGroup/3D-R1@767a5e2): format, 3D boxes, meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.tags import SPACE, answer_or_all, pattern

SOURCE = "AIGeeksGroup/3D-R1@767a5e2"
MAX_BOXES = 200
MAX_TEXT = 65536


def iou_3d(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two axis-aligned boxes (x1, y1, z1, x2, y2, z2), corners in any order."""
    spans = [
        [(min(box[k], box[k + 3]), max(box[k], box[k + 3])) for k in range(3)] for box in (a, b)
    ]
    inter = 1.0
    for (low_a, high_a), (low_b, high_b) in zip(*spans, strict=True):
        if max(low_a, low_b) > min(high_a, high_b):
            return 0.0
        inter *= min(high_a, high_b) - max(low_a, low_b)
    volumes = [math.prod(high - low for low, high in span) for span in spans]
    union = sum(volumes) - inter
    return inter / union if union > 0 else 0.0


def read_boxes(text: str, limit: int | None = None) -> list[list[float]]:
    """Every `box: [x1, y1, z1, x2, y2, z2]` of the text, or the first `limit`."""
    boxes: list[list[float]] = []
    for found in pattern(rf"box:{SPACE}*\[([\p{{Nd}}.,\-{SPACE[1:-1]}]+)\]").finditer(text):
        try:
            box = [float(number.strip()) for number in found.group(1).split(",")]
        except ValueError:
            continue
        if len(box) == 6:
            boxes.append(box)
        if len(boxes) == limit:
            break
    return boxes


def corners(box) -> list[float]:
    """Six numbers as they are; eight (x, y, z) corners as their bounds."""
    if len(box) != 8:
        return list(box)
    axes = list(zip(*box, strict=True))
    return [min(axis) for axis in axes] + [max(axis) for axis in axes]


@reward("three_d_r1/format", source=SOURCE)
def format_reward(text: str) -> float:
    """0.5 for both blocks + 0.25 for a think block > 20 + 0.25 for an answer block > 10 characters.

    Source: AIGeeksGroup/3D-R1@767a5e2, `compute_format_reward`. "upstream": the lengths include
    the tags, so `<answer></answer>` is long enough. "fixed": they do not.
    """
    return rated_blocks(text, False)


def rated_blocks(text: str, with_tags: bool) -> float:
    """The format score, lengths with or without the tags."""
    blocks = [_block(text, tag) for tag in ("think", "answer")]
    tags = [len("<think></think>"), len("<answer></answer>")]
    lengths = [
        0 if block is None else len(block) + with_tags * tag
        for block, tag in zip(blocks, tags, strict=True)
    ]
    return 0.5 * (None not in blocks) + 0.25 * (lengths[0] > 20) + 0.25 * (lengths[1] > 10)


def _block(text: str, tag: str) -> str | None:
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    return text[start + len(tag) + 2 : end] if 0 <= start < end else None


def _truth(*, gt_boxes, **columns) -> str:
    written = (f"box: [{', '.join(map(str, corners(box)))}]" for box in gt_boxes)
    return f"<think>t</think><answer>{' '.join(written)}</answer>"


@reward("three_d_r1/perception", columns=("gt_boxes",), source=SOURCE, truth=_truth)
def perception(text: str, *, gt_boxes) -> float:
    """Mean over the predicted boxes of the best 3D IoU with any true box.

    Source: AIGeeksGroup/3D-R1@767a5e2, `compute_perception_reward`. "upstream": several
    predictions may take the same true box and missed ones cost nothing. "fixed": one to one, best
    pair first, divided by max(n_pred, n_gt).
    """
    if len(text) > MAX_TEXT:
        raise Unscorable("text_too_long")
    said, truth = read_boxes(text, MAX_BOXES + 1), [corners(box) for box in gt_boxes]
    if not truth:
        raise BadColumn("no gt_boxes")
    if len(said) > MAX_BOXES:
        raise Unscorable("too_many_boxes")
    said = [box for box in said if all(math.isfinite(v) and abs(v) < 1e9 for v in box)]
    pairs = sorted(
        ((iou_3d(box, gt), p, g) for p, box in enumerate(said) for g, gt in enumerate(truth)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    total, used_p, used_g = 0.0, set(), set()
    for iou, p, g in pairs:
        if p not in used_p and g not in used_g:
            total, used_p, used_g = total + iou, used_p | {p}, used_g | {g}
    return total / max(len(said), len(truth))


Similarity = Callable[[str, str], float]


@reward("three_d_r1/total", columns=("gt_boxes",), optional=("solution",), range=(-0.3, 1.0),
        source=SOURCE)  # fmt: skip
def total(
    text: str,
    *,
    gt_boxes,
    solution: str | None = None,
    similarity: Similarity | None = None,
) -> float:
    """0.3 format + 0.4 perception + 0.3 similarity(answer, solution), in [-0.3, 1].

    `similarity` is a cosine (CLIP's text tower in the published code); without it or a solution
    that part is 0. Source: AIGeeksGroup/3D-R1@767a5e2, `compute_total_reward`.
    """
    score = 0.3 * format_reward(text) + 0.4 * perception(text, gt_boxes=gt_boxes)
    return score + meaning(text, solution, similarity)


def meaning(text: str, solution: str | None, similarity: Similarity | None) -> float:
    """0.3 of the similarity of the two answers, 0 where either is missing."""
    if similarity is None or solution is None:
        return 0.0
    return 0.3 * similarity(*(answer_or_all(side).strip() for side in (text, solution)))
