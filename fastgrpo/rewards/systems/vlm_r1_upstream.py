# SPDX-License-Identifier: Apache-2.0
"""`vlm_r1` as published (om-ai-lab/VLM-R1@90052f4)."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.registry import published
from fastgrpo.rewards.geometry.overlap import iou as continuous_iou
from fastgrpo.rewards.read.tags import DIGIT, SPACE, answer, pattern, think_answer
from fastgrpo.rewards.systems import vlm_r1

_INT_BOX = rf"\[({DIGIT}+),{SPACE}*({DIGIT}+),{SPACE}*({DIGIT}+),{SPACE}*({DIGIT}+)\]"


def pixel_iou(a, b) -> float:
    """The intersection ends at x2-1, y2-1 and counts pixels with +1; areas do not.

    Raises ZeroDivisionError when both areas cancel or vanish.
    """
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[2], b[2]) - 1, min(a[3], b[3]) - 1
    inter = 0.0
    if left < right and top < bottom:
        inter = (right - left + 1) * (bottom - top + 1)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return float(inter) / union


def rescale(box, image_grid_thw, size, patch_size: int) -> list[float]:
    """A box in pixels of the grid's patches in pixels of an image of `size` (width, height)."""
    grid = image_grid_thw[0] if len(image_grid_thw) == 1 else image_grid_thw
    seen_height, seen_width = int(grid[1]) * patch_size, int(grid[2]) * patch_size
    width, height = size
    return [
        box[0] / seen_width * width,
        box[1] / seen_height * height,
        box[2] / seen_width * width,
        box[3] / seen_height * height,
    ]


@published(vlm_r1.iou)
def iou(
    text: str,
    *,
    solution: str,
    image_size=None,
    image_grid_thw=None,
    image_path=None,
    image=None,
    images=None,
    family: str = "qwen",
    patch_size: int = 14,
) -> float:
    """Integers only; "qwen" rescales by the grid; whatever the box makes fail is 0."""
    _check(family)
    truth = _solution_box(solution)
    found = pattern(_INT_BOX).search(answer(text) or "")
    if found is None:
        return 0.0
    size = None
    if family == "qwen" and image_grid_thw is not None:
        size = image_size or _size_of(image_path, image, images)
    try:
        box = [int(number) for number in found.groups()]
        if size is not None:
            box = rescale(box, image_grid_thw, size, patch_size)
        return (continuous_iou if family == "glm" else pixel_iou)(box, truth)
    except (ArithmeticError, ValueError, TypeError, IndexError, KeyError):
        return 0.0


def _check(family: str) -> None:
    if family not in vlm_r1.FAMILIES:
        raise InputError(f"family: expected one of {vlm_r1.FAMILIES}, got {family!r}")


def _solution_box(solution: Any) -> list[float]:
    if not isinstance(solution, str):
        return solution
    tagged = answer(solution, last=True)
    if tagged is None:
        raise IndexError("list index out of range")
    return json.loads(tagged.strip())


def _size_of(image_path: Any, image: Any, images: Any) -> tuple[int, int] | None:
    """(width, height) from the row's image, whichever column holds it, as the file has it."""
    if image is None and images:
        image = images[0]
    if image is None and image_path:
        image = image_path if isinstance(image_path, str) else image_path[0]
    if isinstance(image, str):
        with Image.open(image) as opened:  # reads the header only
            return opened.size
    return image.size if image is not None else None


@published(vlm_r1.format_tags)
def format_tags(text: str) -> float:
    """The pattern of R1-style code, blanks around the text refused."""
    return float(think_answer(text))


_REC_FORMAT = {
    "qwen": rf"<think>.*?</think>{SPACE}*<answer>.*?\{{.*{_INT_BOX}.*\}}.*?</answer>",
    "internvl": rf"<think>.*?</think>{SPACE}*<answer>.*?{_INT_BOX}.*?</answer>",
    "glm": r"<think>.*?<answer>.*?</answer>",
}


@published(vlm_r1.format_rec)
def format_rec(text: str, *, family: str = "qwen") -> float:
    """The published pattern of each family, anywhere in the text."""
    _check(family)
    return float(pattern(_REC_FORMAT[family]).search(text) is not None)
