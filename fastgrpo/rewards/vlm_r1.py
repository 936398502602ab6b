"""VLM-R1's rewards for referring expressions and formats (om-ai-lab/VLM-R1@90052f4).

The detection rewards are in `vlm_r1_detection`, the answer rewards in `vlm_r1_answers`.
"""

from __future__ import annotations

import json
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.rewards.boxes import finite_box, first_box, iou_continuous, iou_vlm_r1
from fastgrpo.rewards.registry import BadColumn, Unscorable, reward
from fastgrpo.rewards.text import DIGIT, SPACE, answer, pattern, think_answer

SOURCE = "om-ai-lab/VLM-R1@90052f4"

_INT_BOX = rf"\[({DIGIT}+),{SPACE}*({DIGIT}+),{SPACE}*({DIGIT}+),{SPACE}*({DIGIT}+)\]"


@reward(
    "vlm_r1/iou",
    columns=("solution",),
    optional=("image_size", "image_grid_thw", "image_path", "image", "images"),
    source=SOURCE,
    presets={
        "vlm_r1/iou_internvl": {"family": "internvl"},
        "vlm_r1/iou_glm": {"family": "glm"},
    },
)
def iou(
    text: str,
    *,
    solution,
    image_size=None,
    image_grid_thw=None,
    image_path=None,
    image=None,
    images=None,
    family: str = "qwen",
    patch_size: int = 14,
    compat: str,
) -> float:
    """IoU of the first box in the first `<answer>` with the box of the solution, in [0, 1].

    `family="qwen"` rescales the answer from the pixels the model saw (`image_grid_thw` times
    `patch_size`) to image pixels (`image_size` as (width, height), or else the size of the row's
    image); without both columns the two are taken to share one frame. "internvl" and "glm" never
    rescale. The solution is a list of four numbers or a string with one, tags allowed.

    Source: om-ai-lab/VLM-R1@90052f4, `iou_reward` of the three VLM modules. "upstream": only
    non-negative integers match, any Unicode digit does, the intersection is taken with x2-1 and
    y2-1 and counted with +1 while areas are not (qwen, internvl; a one-pixel overlap is 0, two
    empty boxes divide by zero), and a bad solution raises. "fixed": continuous IoU in every
    family, decimals and signs are read, a box with x2 < x1 or y2 < y1 scores 0, a bad solution
    gives None.
    """
    if family not in ("qwen", "internvl", "glm"):
        raise InputError(f"family: expected 'qwen', 'internvl' or 'glm', got {family!r}")
    upstream = compat == "upstream"
    truth = _solution_box(solution, upstream)
    content = answer(text)
    if not content:
        return 0.0
    if family != "qwen" or image_grid_thw is None:
        size = None
    else:
        size = image_size or _size_of(image_path, image, images)
    if upstream:
        found = pattern(_INT_BOX).search(content)
        if found is None:
            return 0.0
        return _upstream_iou(found.groups(), truth, family, image_grid_thw, size, patch_size)
    box = first_box(content)
    if box is None:
        return 0.0
    if size is not None:
        box = rescale(box, image_grid_thw, size, patch_size)
    if box[2] < box[0] or box[3] < box[1]:
        raise Unscorable("reversed_box")
    return iou_continuous(box, truth) if finite_box(box) else 0.0


def _upstream_iou(digits, truth, family, image_grid_thw, size, patch_size) -> float:
    """Whatever the box makes fail is 0, as in the published code's try block."""
    try:
        box = [int(number) for number in digits]
        if size is not None:
            box = rescale(box, image_grid_thw, size, patch_size)
        return (iou_continuous if family == "glm" else iou_vlm_r1)(box, truth)
    except (ArithmeticError, ValueError, TypeError, IndexError, KeyError):
        return 0.0


def _solution_box(solution: Any, upstream: bool) -> list[float]:
    if isinstance(solution, str):
        if upstream:
            tagged = answer(solution, last=True)
            if tagged is None:
                raise IndexError("list index out of range")
            return json.loads(tagged.strip())
        tagged = answer(solution, last=True)
        solution = first_box(solution if tagged is None else tagged)
    if upstream:
        return solution
    if not finite_box(solution):
        raise BadColumn("solution is not a box")
    return solution


def _size_of(image_path: Any, image: Any, images: Any) -> tuple[int, int] | None:
    """(width, height) from the row's image, whichever column holds it."""
    if image is None and images:
        image = images[0]
    if image is None and image_path:
        image = image_path if isinstance(image_path, str) else image_path[0]
    if isinstance(image, str):
        from PIL import Image

        with Image.open(image) as opened:  # reads the header only
            return opened.size
    return image.size if image is not None else None


def rescale(box, image_grid_thw, size, patch_size: int) -> list[float]:
    grid = image_grid_thw[0] if len(image_grid_thw) == 1 else image_grid_thw
    seen_height, seen_width = int(grid[1]) * patch_size, int(grid[2]) * patch_size
    width, height = size
    # Same order of operations as the published code, so that the last bit agrees.
    return [
        box[0] / seen_width * width,
        box[1] / seen_height * height,
        box[2] / seen_width * width,
        box[3] / seen_height * height,
    ]


@reward("vlm_r1/format", source=SOURCE)
def format_tags(text: str, *, compat: str) -> float:
    """1 when the text is `<think>...</think> <answer>...</answer>`, else 0.

    Source: om-ai-lab/VLM-R1@90052f4, `format_reward`. "upstream": any character before or after
    the tags, a blank included, gives 0, and empty tags give 1. "fixed": blanks around are
    allowed, each tag may occur once only, and the answer must not be blank.
    """
    if compat == "upstream":
        return float(think_answer(text))
    return float(think_then_answer(text) is not None)


def think_then_answer(text: str) -> str | None:
    """The answer of a text that is exactly one think block and one answer block, else None."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return None
    if not text.startswith("<think>") or not text.endswith("</answer>"):
        return None
    middle = between_tags(text)
    content = answer(text)
    if middle is None or middle.strip() or not content.strip():
        return None
    return content


def between_tags(text: str) -> str | None:
    closed, opened = text.find("</think>"), text.find("<answer>")
    return text[closed + len("</think>") : opened] if 0 <= closed < opened else None


_REC_FORMAT = {
    "qwen": rf"<think>.*?</think>{SPACE}*<answer>.*?\{{.*{_INT_BOX}.*\}}.*?</answer>",
    "internvl": rf"<think>.*?</think>{SPACE}*<answer>.*?{_INT_BOX}.*?</answer>",
    "glm": r"<think>.*?<answer>.*?</answer>",
}


@reward(
    "vlm_r1/format_rec",
    source=SOURCE,
    presets={
        "vlm_r1/format_rec_internvl": {"family": "internvl"},
        "vlm_r1/format_rec_glm": {"family": "glm"},
    },
)
def format_rec(text: str, *, family: str = "qwen", compat: str) -> float:
    """1 when a think block is followed by an answer that holds a box, else 0.

    Source: om-ai-lab/VLM-R1@90052f4, `format_reward_rec` of the three VLM modules. "upstream":
    the pattern may start and end anywhere and may reach across several answers; qwen wants
    braces around an integer box, internvl an integer box, glm neither a box nor `</think>`.
    "fixed": the text is one think block and one answer block (as `vlm_r1/format`), the answer
    holds four numbers in brackets, and qwen wants braces around them.
    """
    if family not in _REC_FORMAT:
        raise InputError(f"family: expected one of {sorted(_REC_FORMAT)}, got {family!r}")
    if compat == "upstream":
        return float(pattern(_REC_FORMAT[family]).search(text) is not None)
    content = think_then_answer(text)
    if content is None:
        return 0.0
    if family == "qwen":
        content = content[max(content.find("{"), 0) : content.rfind("}") + 1]
        if not content.startswith("{"):
            return 0.0
    return float(first_box(content) is not None)
