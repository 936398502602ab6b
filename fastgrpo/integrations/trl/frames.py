# SPDX-License-Identifier: Apache-2.0
"""What a report's picture of each row needs: the frames its rewards read, and its image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fastgrpo.rewards import Reward
from fastgrpo.rewards.core.check import parts_of
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.read.chat import completion_text
from fastgrpo.rewards.read.faults import BadColumn


def drawn_frames(
    functions: Sequence[Callable],
    rows: Sequence[dict[str, Any]],
    completions: Sequence[Any] | None = None,
) -> list[str] | None:
    """What a picture of each row needs, as JSON: the frames its rewards read, and its image.

    {"answer", "solution": frames, "image", "seen": sizes, "index": which image}, "" for a row of
    which neither its columns, nor its question, nor its completion names one of several images.
    None when no reward reads frames.
    """
    parts = [part for function in functions for part in parts_of(function)]
    framed = [part for part in parts if isinstance(part, Reward) and part.framed]
    if not framed or not rows:
        return None
    columns = {key: [row.get(key) for row in rows] for key in rows[0]}
    columns["prompts"] = [row.get("prompt") for row in rows]
    texts = [completion_text(said) for said in completions] if completions else None
    read = framed[0].frames_of(columns, len(rows), texts)
    return [_drawn(frames, row) for frames, row in zip(read, rows, strict=True)]


def _drawn(frames: RowFrames, row: dict[str, Any]) -> str:
    try:
        index = frames.about
    except BadColumn:
        return ""
    if index is None:
        return ""
    image, seen = frames.sizes[index]
    told = {"answer": frames.answer, "solution": frames.solution, "image": image, "seen": seen}
    return json.dumps(
        told | {"index": index if len(frames.sizes) > 1 else row.get("image_index") or 0}
    )
