# SPDX-License-Identifier: Apache-2.0
"""`rewardmap` as published (fscdc/RewardMap@15428ac)."""

from __future__ import annotations

from typing import Any

from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.systems import rewardmap as fixed


@published(fixed.total)
def total(
    text: str,
    *,
    solution: Any,
    type: str,
    difficulty_city: str,
    station1: str = "",
    station2: str = "",
    metro_data: dict[str, list[str]] | None = None,
    question_transfer_count: int | None = None,
    mode: str = "difficulty_aware",
) -> float:
    """Every section beyond the transfer count loses 5, the last one of a right route too."""
    fixed.check_mode(mode)
    weight = fixed.weight_of(type, question_transfer_count, difficulty_city, mode)
    route = (metro_data, station1, station2, question_transfer_count)
    allowed = question_transfer_count or 0
    return fixed.score_of(text[-fixed.MAX_TEXT :], solution, type, route, allowed) * weight
