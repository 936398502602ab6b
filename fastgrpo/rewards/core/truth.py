# SPDX-License-Identifier: Apache-2.0
"""Answers made from a solution, which a reward must pay its top."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.read.items import solution_detections


def thought(content: str) -> str:
    """A completion that thinks and answers `content`."""
    return f"<think>t</think><answer>{content}</answer>"


def fenced(items: Any) -> str:
    """The items as a fenced block of JSON."""
    return f"```json\n{json.dumps(items)}\n```"


def written_box(box: Sequence[float], frames: RowFrames) -> str:
    """A box of the solution as the family writes it: `[x1, y1, x2, y2]`, or location tokens."""
    values = answer_box(box, frames)
    if frames.answer == "locations":
        return "".join(f"<loc{min(round(v), 1023):04d}>" for v in values)
    return f"[{', '.join(map(str, values))}]"


def answer_box(box: Sequence[float], frames: RowFrames) -> list[float]:
    """A box of the solution in the frame of the answer, whole numbers as integers."""
    values = (round(float(v), 9) for v in frames.to_answer(list(box)))
    return [int(v) if v.is_integer() else v for v in values]


def detection_truth(*, solution: Any, frames: RowFrames, **columns: Any) -> str:
    """The solution's labelled boxes as the fenced list of an answer."""
    truth = solution_detections(solution)
    items = [
        {"bbox_2d": answer_box(box, frames), "label": label}
        for box, label in zip(truth.boxes.tolist(), truth.labels, strict=True)
    ]
    return thought(fenced(items))
