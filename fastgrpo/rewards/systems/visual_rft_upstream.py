# SPDX-License-Identifier: Apache-2.0
"""`visual_rft` as published (Liuziyu77/Visual-RFT@9486633)."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.geometry.overlap import giou, iou
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.faults import TEXT_FAULTS
from fastgrpo.rewards.read.items import MAX_JSON
from fastgrpo.rewards.read.tags import answer_or_all, one_line_answer, pattern, think_answer
from fastgrpo.rewards.systems import visual_rft as fixed


@published(fixed.iou_reward)
def iou_reward(text: str, *, solution: str, iou_threshold: float = 0.5) -> float:
    """math-verify on the whole texts, else the sum of IoU / max(n_gt, n_pred)."""
    return _detection(text, solution, iou_threshold, _iou_of)


@published(fixed.confidence_reward)
def confidence_reward(text: str, *, solution: str, iou_threshold: float = 0.5) -> float:
    """math-verify on the whole texts, else the mean of c or 1 - c."""
    return _detection(text, solution, iou_threshold, _confidence_of)


@published(fixed.format_reward)
def format_reward(text: str) -> float:
    """The pattern of R1-style code."""
    return float(think_answer(text))


@published(fixed.classification)
def classification(text: str, *, solution: str) -> float:
    """math-verify, then substring either way."""
    if math_pool.equal(text, solution).equal:
        return 1.0
    truth, said = (fixed.class_name(one_line_answer(side)) for side in (solution, text))
    return float(truth in said or said in truth)


@published(fixed.giou_reward)
def giou_reward(text: str, *, solution: str) -> float:
    """math-verify, equal strings, then the corners of the first two boxes merged."""
    if math_pool.equal(text, solution).equal:
        return 1.0
    said, truth = answer_or_all(text).strip(), one_line_answer(solution)
    if said == truth:
        return 2.0
    try:
        return giou(_merged_corners(truth), _merged_corners(said)) + 1
    except (IndexError, ValueError, ArithmeticError):
        return 0.0


_POINT = r"\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)"
_CORNERS = rf"{_POINT}\s*,\s*{_POINT}"


def _merged_corners(text: str) -> list[float]:
    first_two = islice(pattern(_CORNERS).finditer(text), 2)  # no further one is looked at
    found = [[int(n) / 1000 for n in m.groups()] for m in first_two]
    corners = [b[:2] for b in found] + [b[2:] for b in found]
    return corners[0] + corners[1]


def _detection(text: str, solution: str, threshold: float, score) -> float:
    if math_pool.equal(text, solution).equal:
        return 1.0
    try:
        said = one_line_answer(text).replace("[[", "[").replace("]]", "]").replace("\n", "")
        preds, truths = _items(f"<answer>{said}</answer>"), _items(solution.strip())
        if preds is None or type(preds[0]) is not dict:
            return 0.0
        results = _match(truths, preds, threshold)
        return min(max(score(results, len(truths)), 0.0), 1.0)
    except TEXT_FAULTS:
        return 0.0


def _items(text: str) -> list[Any] | None:
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


def _match(truths, preds, threshold: float) -> list[tuple[float, float]]:
    """(IoU or 0, confidence) by falling confidence."""
    unique = {tuple(pred["Position"]): pred for pred in reversed(preds)}
    kept = sorted(reversed(unique.values()), key=lambda pred: pred["Confidence"], reverse=True)
    free, results = list(range(len(truths))), []
    for pred in kept:
        best, taken = 0, None
        for i in free:
            x1, y1, x2, y2 = truths[i]["Position"]
            u1, v1, u2, v2 = pred["Position"]
            overlap = iou((x1, y1, x2, y2), (u1, v1, u2, v2))
            if overlap > best:
                best, taken = overlap, i
        if best > threshold:
            free.remove(taken)
        results.append((best if best > threshold else 0, pred["Confidence"]))
    return results


def _iou_of(results, num_gt: int) -> float:
    return sum(overlap for overlap, _ in results) / max(num_gt, len(results))


def _confidence_of(results, num_gt: int) -> float:
    return sum(c if overlap else 1 - c for overlap, c in results) / len(results)
