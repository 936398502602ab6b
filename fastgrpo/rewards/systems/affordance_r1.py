# SPDX-License-Identifier: Apache-2.0
"""Affordance-R1's reward (hq-King/Affordance-R1@d040e27): format, boxes and points, words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import answer_box
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.read.boxes import finite_box, finite_point, ordered_box
from fastgrpo.rewards.read.faults import TEXT_FAULTS, BadColumn, Unscorable
from fastgrpo.rewards.read.items import MAX_JSON
from fastgrpo.rewards.read.tags import SPACE, answer, pattern

SOURCE = "hq-King/Affordance-R1@d040e27"
MAX_OBJECTS = 120
MAX_REPEATED = 1 << 16
Similarity = Callable[[list[str], str], float]


def answer_items(text: str) -> Any:
    """The JSON of the first answer; ValueError without one."""
    content = answer(text)
    if content is None or len(content) > MAX_JSON:
        raise Unscorable("no_answer" if content is None else "json_too_long")
    return json.loads(content.strip())


def _truth(*, solution, frames, affordance="", **columns) -> str:
    items = [
        {
            "bbox_2d": answer_box(item["bbox_2d"], frames),
            "point_2d": np.asarray(frames.to_answer(np.array(item["point_2d"], float))).tolist(),
            "affordance": affordance,
        }
        for item in _solution(solution)
    ]
    return f"<think>t</think><rethink>r</rethink><answer>{json.dumps(items)}</answer>"


@reward("affordance_r1/accuracy", columns=("solution",), range=(0.0, 3.0), source=SOURCE,
        framed=True, truth=_truth)  # fmt: skip
def accuracy(
    text: str,
    *,
    solution,
    frames: RowFrames,
    iou_above: float = 0.65,
    l1_below: float = 10.0,
    point_below: float = 30.0,
) -> float:
    """Mean over the optimal pairs of [IoU > 0.65] + [mean L1 < 10] + [point near and inside].

    The answer is a JSON list of {"bbox_2d", "point_2d"}; the pairs maximise the sum, which is
    divided by max(n_pred, n_gt); at most 120 objects of each side. A point counts when it is less
    than 30 pixels from the other and inside its own predicted box. IoU counts pixels (+1).
    Distances are in pixels of the upright image, or as given where both sides share a frame.

    Source: hq-King/Affordance-R1@d040e27, `aff_r1_score_accuracy_reward`. "upstream": one bad item
    makes the whole answer 0. "fixed": a bad item counts as a prediction that matches nothing, and
    more than 120 predictions count all in the denominator.
    """
    truths = _solution(solution)
    items = answer_items(text)
    if not isinstance(items, list):
        raise Unscorable("not_a_list")
    good = [item for item in items[:MAX_OBJECTS] if _usable(item)]
    if not good:
        return 0.0
    sides = _pixels(good, frames, "answer"), _pixels(truths, frames, "solution")
    return pair_scores(*sides, iou_above, l1_below, point_below) / max(len(items), len(truths))


def _pixels(items, frames: RowFrames, side: str) -> list[tuple[Any, Any]]:
    """(box, point) of each item, in pixels of the image: what the distances are measured in."""
    boxes, points = (
        np.array([item[key] for item in items], dtype=np.float64) for key in ("bbox_2d", "point_2d")
    )
    convert = frames.answer_in if side == "answer" else frames.solution_in
    boxes, points = convert("image", boxes), convert("image", points)
    return list(zip(boxes, points, strict=True))


def pair_scores(preds, truths, iou_above: float, l1_below: float, point_below: float) -> float:
    """The largest sum of part scores over one-to-one pairs of (box, point)."""
    boxes, points = _arrays(preds)
    gt_boxes, gt_points = _arrays(truths)
    near = np.abs(boxes[:, None] - gt_boxes[None]).mean(-1) < l1_below
    apart = np.sqrt(((points[:, None] - gt_points[None]) ** 2).sum(-1))
    inside = ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(1)
    score = (_pixel_iou(boxes, gt_boxes) > iou_above).astype(float) + near
    score += (apart < point_below) & inside[:, None]
    rows, cols = linear_sum_assignment(3.0 - score)
    return float(score[rows, cols].sum())


def _arrays(pairs) -> tuple[np.ndarray, np.ndarray]:
    boxes, points = (np.array(side) for side in zip(*pairs, strict=True))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or points.ndim != 2 or points.shape[1] != 2:
        raise ValueError("boxes of four and points of two numbers expected")
    return boxes, points


def _pixel_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, N) IoU that counts pixels; numpy, because upstream's reversed boxes keep their signs."""
    left, right = (
        np.maximum(a[:, None, :2], b[None, :, :2]),
        np.minimum(a[:, None, 2:], b[None, :, 2:]),
    )
    inter = np.maximum(0, right - left + 1).prod(-1)
    areas = [(side[:, 2:] - side[:, :2] + 1).prod(-1) for side in (a, b)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return inter / (areas[0][:, None] + areas[1][None] - inter)


def _usable(item: Any) -> bool:
    known = isinstance(item, dict) and ordered_box(item.get("bbox_2d"))
    return known and finite_point(item.get("point_2d"))


def _solution(solution: Any) -> list[dict]:
    try:
        truths = json.loads(solution) if isinstance(solution, str) else list(solution)
    except (TypeError, ValueError) as fault:
        raise BadColumn(f"solution: {fault}") from None
    if not truths or not all(_usable(item) for item in truths):
        raise BadColumn("solution: items need bbox_2d and point_2d")
    return truths[:MAX_OBJECTS]


_BLOCKS = rf"<think>.*?</think>{SPACE}*<rethink>.*?</rethink>{SPACE}*<answer>.*?</answer>"


def blocks(text: str) -> float:
    """1 for think, rethink and answer blocks in this order."""
    return float(pattern(_BLOCKS).fullmatch(text) is not None)


@reward("affordance_r1/format", range=(0.0, 4.0), source=SOURCE)
def format_reward(text: str) -> float:
    """1 for think, rethink, answer, plus the mean over the items of three parts present.

    The parts are a "bbox_2d" list of four, a "point_2d" list of two, the key "affordance".

    Source: hq-King/Affordance-R1@d040e27, `aff_r1_score_format_reward`. "fixed" equals "upstream"
    but wants numbers in the lists and text as affordance.
    """
    try:
        items = answer_items(text)
        return blocks(text) + sum(sum(_parts(item)) for item in items) / len(items)
    except TEXT_FAULTS:
        return blocks(text)


def _parts(item: Any) -> list[bool]:
    return [
        finite_box(item.get("bbox_2d")),
        finite_point(item.get("point_2d")),
        isinstance(item.get("affordance"), str),
    ]


@reward("affordance_r1/non_repeat", source=SOURCE)
def non_repeat(text: str) -> float:
    """0 when sentences (between full stops) repeat twice or more, else 1.

    Source: hq-King/Affordance-R1@d040e27, `aff_r1_score_non_repeat_reward`. "fixed" looks at the
    last 65,536 characters.
    """
    return few_repeats(text[-MAX_REPEATED:])


def few_repeats(text: str) -> float:
    """1 when fewer than two sentences repeat another."""
    sentences = [s for s in map(str.strip, text.split(".")) if s]
    return float(len(sentences) - len(set(sentences)) < 2)


@reward("affordance_r1/affordance", columns=("affordance",), source=SOURCE)
def affordance_word(text: str, *, affordance: str, similarity: Similarity | None = None) -> float:
    """1 when `similarity(predicted affordances, affordance)` > 0.8; without one, when all are it.

    Source: hq-King/Affordance-R1@d040e27, `aff_reward_compute_score`, whose similarity is
    word2vec's. Any fault gives 0 in both modes.
    """
    try:
        words = [item["affordance"] for item in answer_items(text)]
        if similarity is not None:
            return float(similarity(words, affordance) > 0.8)
        return float(
            bool(words) and {str(w).strip().lower() for w in words} == {affordance.lower()}
        )
    except TEXT_FAULTS:
        return 0.0


@reward("affordance_r1/count", columns=("solution",), source=SOURCE)
def count(text: str, *, solution) -> float:
    """1 when answer and solution have equally many items. Source: `aff_r1_score`, both modes."""
    try:
        truths = json.loads(solution) if isinstance(solution, str) else solution
        return float(len(answer_items(text)) == len(truths))
    except TEXT_FAULTS:
        return 0.0


@reward("affordance_r1/total", columns=("solution",), optional=("affordance",), range=(0.0, 10.0),
        source=SOURCE, framed=True, truth=_truth)  # fmt: skip
def total(
    text: str,
    *,
    solution,
    frames: RowFrames,
    affordance: str = "",
    similarity: Similarity | None = None,
) -> float:
    """format + accuracy + non-repeat + affordance + count, in [0, 10].

    Source: hq-King/Affordance-R1@d040e27, `aff_r1_score` (its part reward is commented out).
    """
    try:
        boxes = accuracy(text, solution=solution, frames=frames)
    except BadColumn:
        raise
    except TEXT_FAULTS:
        boxes = 0.0
    words = affordance_word(text, affordance=affordance, similarity=similarity)
    return format_reward(text) + boxes + non_repeat(text) + words + count(text, solution=solution)
