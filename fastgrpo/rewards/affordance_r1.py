"""Affordance-R1's reward (hq-King/Affordance-R1@d040e27): format, boxes and points, words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from fastgrpo.rewards.boxes import finite_box, ordered_box
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import MAX_JSON, SPACE, answer, pattern

SOURCE = "hq-King/Affordance-R1@d040e27"
MAX_OBJECTS = 120
MAX_REPEATED = 1 << 16
Similarity = Callable[[list[str], str], float]

_FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)


def _items(text: str) -> Any:
    """The JSON of the first answer; ValueError without one."""
    content = answer(text)
    if content is None or len(content) > MAX_JSON:
        raise Unscorable("no_answer" if content is None else "json_too_long")
    return json.loads(content.strip())


@reward("affordance_r1/accuracy", columns=("solution",), range=(0.0, 3.0), source=SOURCE)
def accuracy(
    text: str,
    *,
    solution,
    iou_above: float = 0.65,
    l1_below: float = 10.0,
    point_below: float = 30.0,
    compat: str,
) -> float:
    """Mean over the optimal pairs of [IoU > 0.65] + [mean L1 < 10] + [point near and inside].

    The answer is a JSON list of {"bbox_2d", "point_2d"}; the pairs maximise the sum, which is
    divided by max(n_pred, n_gt); at most 120 objects of each side. A point counts when it is less
    than 30 pixels from the other and inside its own predicted box. IoU counts pixels (+1).

    Source: hq-King/Affordance-R1@d040e27, `aff_r1_score_accuracy_reward`. "upstream": one bad item
    makes the whole answer 0. "fixed": a bad item counts as a prediction that matches nothing, and
    more than 120 predictions count all in the denominator.
    """
    if compat == "upstream":
        try:
            items, truths = _items(text), json.loads(solution)
            return _upstream_accuracy(items, truths, iou_above, l1_below, point_below)
        except _FAULTS:
            return 0.0
    truths = _truths(solution)
    items = _items(text)
    if not isinstance(items, list):
        raise Unscorable("not_a_list")
    good = [item for item in items[:MAX_OBJECTS] if _usable(item)]
    if not good:
        return 0.0
    total = _matched_points(good, truths, iou_above, l1_below, point_below)
    return total / max(len(items), len(truths))


def _upstream_accuracy(items, truths, *bounds: float) -> float:
    pairs = [[(i["bbox_2d"], i["point_2d"]) for i in side] for side in (items, truths)]
    total = _score_pairs(*(p[:MAX_OBJECTS] for p in pairs), *bounds)
    return total / max(*(len(p[:MAX_OBJECTS]) for p in pairs))


def _matched_points(items, truths, *bounds: float) -> float:
    sides = ([(i["bbox_2d"], i["point_2d"]) for i in side] for side in (items, truths))
    return _score_pairs(*sides, *bounds)


def _score_pairs(preds, truths, iou_above: float, l1_below: float, point_below: float) -> float:
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
    if not isinstance(item, dict) or not ordered_box(item.get("bbox_2d")):
        return False
    point = item.get("point_2d")
    return isinstance(point, list) and len(point) == 2 and finite_box([*point, 0, 0])


def _truths(solution: Any) -> list[dict]:
    try:
        truths = json.loads(solution) if isinstance(solution, str) else list(solution)
    except (TypeError, ValueError) as fault:
        raise BadColumn(f"solution: {fault}") from None
    if not truths or not all(_usable(item) for item in truths):
        raise BadColumn("solution: items need bbox_2d and point_2d")
    return truths[:MAX_OBJECTS]


_BLOCKS = rf"<think>.*?</think>{SPACE}*<rethink>.*?</rethink>{SPACE}*<answer>.*?</answer>"


@reward("affordance_r1/format", range=(0.0, 4.0), source=SOURCE)
def format_reward(text: str, *, compat: str) -> float:
    """1 for think, rethink, answer, plus the mean over the items of three parts present.

    The parts are a "bbox_2d" list of four, a "point_2d" list of two, the key "affordance".

    Source: hq-King/Affordance-R1@d040e27, `aff_r1_score_format_reward`. "fixed" equals "upstream"
    but wants numbers in the lists and text as affordance.
    """
    blocks = float(pattern(_BLOCKS).fullmatch(text) is not None)
    try:
        items = _items(text)
        parts = [sum(_parts(item, compat)) / len(items) for item in items]
    except _FAULTS:
        return blocks if compat == "fixed" else blocks + _before_fault(text)
    return blocks + sum(parts)


def _before_fault(text: str) -> float:
    """What the published loop has added when an item of a wrong type stops it."""
    total = 0.0
    try:
        items = _items(text)
        for item in items:
            total += sum(_parts(item, "upstream")) / len(items)
    except _FAULTS:
        pass
    return total


def _parts(item: Any, compat: str) -> list[bool]:
    if compat == "upstream":
        sizes = (("bbox_2d", 4), ("point_2d", 2))
        lists = [k in item and isinstance(item[k], list) and len(item[k]) == n for k, n in sizes]
        return [*lists, "affordance" in item]
    point = item.get("point_2d")
    return [
        finite_box(item.get("bbox_2d")),
        isinstance(point, list) and finite_box([*point, 0, 0]),
        isinstance(item.get("affordance"), str),
    ]


@reward("affordance_r1/non_repeat", source=SOURCE)
def non_repeat(text: str, *, compat: str) -> float:
    """0 when sentences (between full stops) repeat twice or more, else 1.

    Source: hq-King/Affordance-R1@d040e27, `aff_r1_score_non_repeat_reward`. "fixed" looks at the
    last 65,536 characters.
    """
    text = text if compat == "upstream" else text[-MAX_REPEATED:]
    sentences = [s for s in map(str.strip, text.split(".")) if s]
    return float(len(sentences) - len(set(sentences)) < 2)


@reward("affordance_r1/affordance", columns=("affordance",), source=SOURCE)
def affordance_word(
    text: str, *, affordance: str, similarity: Similarity | None = None, compat: str
) -> float:
    """1 when `similarity(predicted affordances, affordance)` > 0.8; without one, when all are it.

    Source: hq-King/Affordance-R1@d040e27, `aff_reward_compute_score`, whose similarity is
    word2vec's. Any fault gives 0 in both modes.
    """
    try:
        words = [item["affordance"] for item in _items(text)]
        if similarity is not None:
            return float(similarity(words, affordance) > 0.8)
        return float(
            bool(words) and {str(w).strip().lower() for w in words} == {affordance.lower()}
        )
    except _FAULTS:
        return 0.0


@reward("affordance_r1/count", columns=("solution",), source=SOURCE)
def count(text: str, *, solution, compat: str) -> float:
    """1 when answer and solution have equally many items. Source: `aff_r1_score`, both modes."""
    try:
        truths = json.loads(solution) if isinstance(solution, str) else solution
        return float(len(_items(text)) == len(truths))
    except _FAULTS:
        return 0.0


@reward("affordance_r1/total", columns=("solution",), optional=("affordance",), range=(0.0, 10.0),
        source=SOURCE)  # fmt: skip
def total(
    text: str,
    *,
    solution,
    affordance: str = "",
    similarity: Similarity | None = None,
    compat: str,
) -> float:
    """format + accuracy + non-repeat + affordance + count, in [0, 10].

    Source: hq-King/Affordance-R1@d040e27, `aff_r1_score` (its part reward is commented out).
    """
    try:
        boxes = accuracy(text, solution=solution, compat=compat)
    except BadColumn:
        raise
    except _FAULTS:
        boxes = 0.0
    words = affordance_word(text, affordance=affordance, similarity=similarity, compat=compat)
    return (
        format_reward(text, compat=compat)
        + boxes
        + non_repeat(text, compat=compat)
        + words
        + count(text, solution=solution, compat=compat)
    )
