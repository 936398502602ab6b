# SPDX-License-Identifier: Apache-2.0
"""VLM-R1's rewards for referring expressions and formats (om-ai-lab/VLM-R1@90052f4).

The detection rewards are in `vlm_r1_detection`, the answer rewards in `vlm_r1_answers`.
"""

from __future__ import annotations

from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.guard import Note
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.core.truth import thought, written_box
from fastgrpo.rewards.geometry.frames import SAME, RowFrames
from fastgrpo.rewards.geometry.overlap import iou as overlap
from fastgrpo.rewards.read.boxes import bracket_box, finite_box, first_box, other_box, whole_box
from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.tags import answer, last_answer, think_then_answer

SOURCE = "om-ai-lab/VLM-R1@90052f4"
FAMILIES = ("qwen", "internvl", "glm")


def solution_box(solution: Any) -> list[float]:
    """The box of a solution: four numbers, or text with one, tags allowed."""
    if isinstance(solution, str):
        box = whole_box(solution) or first_box(last_answer(solution))
    else:
        box = list(solution) if finite_box(solution) else None
    if box is None:
        raise BadColumn("solution is not a box")
    return box


def _truth(*, solution, frames: RowFrames, **columns) -> str:
    return thought(f'{{"bbox_2d": {written_box(solution_box(solution), frames)}}}')


@reward(
    "vlm_r1/iou",
    columns=("solution",),
    optional=("image_grid_thw",),
    source=SOURCE,
    batched=True,
    framed=True,
    truth=_truth,
    presets={
        "vlm_r1/iou_internvl": {"family": "internvl"},
        "vlm_r1/iou_glm": {"family": "glm"},
    },
)
def iou(
    texts: list[str],
    note: Note,
    *,
    solution: list[Any],
    frames: list[RowFrames],
    image_grid_thw: list[Any] | None = None,
    family: str = "qwen",
    patch_size: int = 14,
) -> list[float | None]:
    """IoU of the first box in the first `<answer>` with the box of the solution, in [0, 1].

    The answer is converted from the frame it is given in to the solution's (`geometry.frames`).
    Where nobody states that frame, `family="qwen"` with the column `image_grid_thw` means pixels of
    the image Qwen2.5-VL saw, the grid times `patch_size`. The solution is a list of four numbers
    or a string with one, tags allowed.

    Source: om-ai-lab/VLM-R1@90052f4, `iou_reward` of the three VLM modules. "upstream": only
    non-negative integers match, any Unicode digit does, "qwen" always rescales by the grid and the
    others never do, the intersection is taken with x2-1 and y2-1 and counted with +1 while areas
    are not (qwen, internvl; a one-pixel overlap is 0, two empty boxes divide by zero), and a bad
    solution raises. "fixed": continuous IoU in every family, decimals, signs and exponents are
    read, a box with x2 < x1 or y2 < y1 scores 0, a bad solution or an unknown size gives None.
    """
    if family not in FAMILIES:
        raise InputError(f"family: expected one of {FAMILIES}, got {family!r}")
    if family == "qwen" and image_grid_thw is not None:
        grids = zip(frames, image_grid_thw, strict=True)
        frames = [_as_seen(frame, grid, patch_size) for frame, grid in grids]
    values: list[float | None] = []
    known: dict[str, list[float]] = {}  # the rows of a group share their solution
    for i, (text, truth, frame) in enumerate(zip(texts, solution, frames, strict=True)):
        try:
            box = known.get(truth) if type(truth) is str else None
            if box is None:
                box = solution_box(truth)
                if type(truth) is str:
                    known[truth] = box
            values.append(score_box(text, box, frame))
        except BadColumn as fault:
            note(i, f"bad_column: {fault}")
            values.append(None)
        except Unscorable as fault:
            note(i, str(fault))
            values.append(0.0)
    return values


def score_box(text: str, truth: list[float], frame: RowFrames) -> float:
    """IoU of the first box in the first `<answer>` with the solution's box."""
    content = answer(text)
    box = (bracket_box(content) or other_box(content)) if content else None
    if box is None:
        return 0.0
    if frame is not SAME:
        box = frame.to_solution(box)
    x1, y1, x2, y2 = box
    if x1 > x2 or y1 > y2:
        raise Unscorable("reversed_box")
    return overlap(box, truth)


def _as_seen(frame: RowFrames, grid: Any, patch_size: int) -> RowFrames:
    """The row with its one grid of patches as the size seen, unless the frame is stated."""
    if frame.stated or grid is None or not len(grid):
        return frame
    if len(grid) == 1:
        grid = grid[0]
    if len(grid) != 3 or hasattr(grid[0], "__len__"):
        raise BadColumn(f"frame: image_grid_thw of {len(grid)} images")
    seen = int(grid[2]) * patch_size, int(grid[1]) * patch_size
    return RowFrames("seen", frame.solution, frame.row | {"seen_sizes": seen})


@reward("vlm_r1/format", source=SOURCE)
def format_tags(text: str) -> float:
    """1 when the text is `<think>...</think> <answer>...</answer>`, else 0.

    Source: om-ai-lab/VLM-R1@90052f4, `format_reward`. "upstream": any character before or after
    the tags, a blank included, gives 0, and empty tags give 1. "fixed": blanks around are
    allowed, each tag may occur once only, and the answer must not be blank.
    """
    return float(think_then_answer(text) is not None)


@reward(
    "vlm_r1/format_rec",
    source=SOURCE,
    presets={
        "vlm_r1/format_rec_internvl": {"family": "internvl"},
        "vlm_r1/format_rec_glm": {"family": "glm"},
    },
)
def format_rec(text: str, *, family: str = "qwen") -> float:
    """1 when a think block is followed by an answer that holds a box, else 0.

    Source: om-ai-lab/VLM-R1@90052f4, `format_reward_rec` of the three VLM modules. "upstream":
    the pattern may start and end anywhere and may reach across several answers; qwen wants
    braces around an integer box, internvl an integer box, glm neither a box nor `</think>`.
    "fixed": the text is one think block and one answer block (as `vlm_r1/format`), the answer
    holds a box, and qwen wants braces around it.
    """
    if family not in FAMILIES:
        raise InputError(f"family: expected one of {FAMILIES}, got {family!r}")
    content = think_then_answer(text)
    if content is None:
        return 0.0
    if family == "qwen":
        content = content[max(content.find("{"), 0) : content.rfind("}") + 1]
        if not content.startswith("{"):
            return 0.0
    return float(first_box(content) is not None)
