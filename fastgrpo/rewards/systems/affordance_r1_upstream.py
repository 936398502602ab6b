# SPDX-License-Identifier: Apache-2.0
"""`affordance_r1` as published (hq-King/Affordance-R1@d040e27)."""

from __future__ import annotations

import json
from typing import Any

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.read.faults import TEXT_FAULTS
from fastgrpo.rewards.systems import affordance_r1 as fixed
from fastgrpo.rewards.systems.affordance_r1 import MAX_OBJECTS


@published(fixed.accuracy)
def accuracy(
    text: str,
    *,
    solution: str,
    iou_above: float = 0.65,
    l1_below: float = 10.0,
    point_below: float = 30.0,
) -> float:
    """One bad item makes the whole answer 0; items beyond 120 do not count at all."""
    try:
        sides = [
            [(item["bbox_2d"], item["point_2d"]) for item in side][:MAX_OBJECTS]
            for side in (fixed.answer_items(text), json.loads(solution))
        ]
        total = fixed.pair_scores(*sides, iou_above, l1_below, point_below)
        return total / max(map(len, sides))
    except TEXT_FAULTS:
        return 0.0


@published(fixed.format_reward)
def format_reward(text: str) -> float:
    """Lists of any content; what the loop added before an item of a wrong type stays."""
    total = 0.0
    try:
        items = fixed.answer_items(text)
        for item in items:
            total += sum(_parts(item)) / len(items)
    except TEXT_FAULTS:
        pass
    return fixed.blocks(text) + total


def _parts(item: Any) -> list[bool]:
    sizes = (("bbox_2d", 4), ("point_2d", 2))
    lists = [k in item and isinstance(item[k], list) and len(item[k]) == n for k, n in sizes]
    return [*lists, "affordance" in item]


@published(fixed.non_repeat)
def non_repeat(text: str) -> float:
    """Of the whole text."""
    return fixed.few_repeats(text)


@published(fixed.total)
def total(
    text: str,
    *,
    solution: str,
    affordance: str = "",
    similarity: fixed.Similarity | None = None,
) -> float:
    """The sum of the published parts."""
    return (
        format_reward(text)
        + accuracy(text, solution=solution)
        + non_repeat(text)
        + fixed.affordance_word(text, affordance=affordance, similarity=similarity)
        + fixed.count(text, solution=solution)
    )
