# SPDX-License-Identifier: Apache-2.0
"""The box and the overlap that VLM-R1's evaluation scripts find.

Source: om-ai-lab/VLM-R1@90052f4, `src/eval`. Each counts an answer as right where the overlap is
above 0.5. An answer without a box is the box [0, 0, 0, 0]. Sizes are those of the upright image;
the scripts take the file's own, which differ where a photograph carries a rotation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from fastgrpo.rewards.geometry.frames import Size, convert
from fastgrpo.rewards.read.faults import BadColumn
from fastgrpo.rewards.read.tags import DIGIT, SPACE, answer, fenced_json, pattern
from fastgrpo.rewards.systems.vlm_r1_upstream import pixel_iou

Box = list[float]
_INTEGERS = rf"\[({DIGIT}+),{SPACE}*({DIGIT}+),{SPACE}*({DIGIT}+),{SPACE}*({DIGIT}+)\]"
_NUMBER = rf"({SPACE}*-?{DIGIT}*\.?{DIGIT}+{SPACE}*)"
_DECIMALS = rf"\[{_NUMBER},{SPACE}*{_NUMBER},{SPACE}*{_NUMBER},{SPACE}*{_NUMBER}\]"
_MAX_CHARS = 1 << 20
NOTHING = (0, 0, 0, 0)


def _braced(text: str) -> Sequence[float]:
    """The last integer box between the first `{` and a later `}` of the first answer."""
    content = (answer(text[:_MAX_CHARS]) or "").strip()
    found = pattern(rf"\{{.*{_INTEGERS}{SPACE}*.*\}}").search(content)
    return NOTHING if found is None else [int(number) for number in found.groups()]


def _first(text: str) -> Sequence[float]:
    """The first integer box of the first answer."""
    found = pattern(_INTEGERS).search((answer(text[:_MAX_CHARS]) or "").strip())
    return NOTHING if found is None else [int(number) for number in found.groups()]


def _anywhere(text: str) -> Sequence[float]:
    """The first box of decimals, wherever it stands."""
    found = pattern(_DECIMALS).search(text[:_MAX_CHARS])
    return NOTHING if found is None else [float(number) for number in found.groups()]


def _item(text: str) -> Sequence[float]:
    """`bbox_2d` of the first item of the first fenced JSON."""
    content = (fenced_json(text[:_MAX_CHARS]) or "").strip()
    try:
        box = json.loads(content)[0]["bbox_2d"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return NOTHING
    if not isinstance(box, list) or len(box) != 4:
        raise BadColumn(f"the script stops at the box {box!r:.80}")
    return box


def _script(read: Callable[[str], Sequence[float]], rescaled: bool):
    def overlap(
        text: str, truth: Sequence[float], image: Size | None, seen: Size | None
    ) -> tuple[Box, float]:
        box = list(read(text))
        if rescaled:
            box = convert(box, "seen", "image", image=image, seen=seen)
        return box, pixel_iou(box, truth)

    return overlap


# Name of the script -> f(text, box of the solution, image size, seen size) -> (box, overlap)
SCRIPTS = {
    "test_rec_r1": _script(_braced, rescaled=True),
    "test_rec_r1_internvl": _script(_first, rescaled=False),
    "test_rec_baseline": _script(_anywhere, rescaled=True),
    "test_od_r1": _script(_item, rescaled=False),
}
