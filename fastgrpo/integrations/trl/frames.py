# SPDX-License-Identifier: Apache-2.0
"""What a reward is told about its row: the sizes of its images, the frame the model answers in.

The columns are those of `fastgrpo.rewards.geometry.frames`; a column of the data set of the same
name is left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastgrpo.images import ImageFault, image_size
from fastgrpo.models import families
from fastgrpo.rewards import Reward
from fastgrpo.rewards.core.check import parts_of
from fastgrpo.rewards.geometry.frames import RowFrames, Size
from fastgrpo.rewards.read.faults import BadColumn

# A family's convention, as `fastgrpo.models.Coordinates` names it, in the words of the rewards.
_FRAMES = {
    ("pixels", "xyxy"): "seen",
    ("thousandths", "xyxy"): "thousandths",
    ("thousandths", "yxyx"): "thousandths_yx",
    ("1024ths", "yxyx"): "locations",
}


def model_frame(config: Any) -> str | None:
    """The frame the family of a model config writes boxes in; None where it states none."""
    family = families().get(getattr(config, "model_type", None))
    stated = None if family is None else family.coordinates
    return None if stated is None else _FRAMES[stated.frame, stated.order]


def frame_columns(
    frame: str | None, processor: Any, images: Sequence[Sequence | None], fields: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`model_frame`, `image_sizes` and `seen_sizes` of each row, {} for a row without images.

    `images` are each row's as the processor was given them, `fields` what it returned for all of
    them, one after another. Sizes are (width, height), None where not known. Where the processor
    gives grids of patches, a row of one image has VLM-R1's `image_grid_thw` too: [[t, h, w]].
    """
    count = sum(len(row or ()) for row in images)
    seen = iter(seen_sizes(processor, fields, count))
    grids = iter(_listed(fields.get("image_grid_thw", [])))
    rows = []
    for row in images:
        told = {"model_frame": frame, "image_sizes": [_upright(image) for image in row or ()]}
        told["seen_sizes"] = [next(seen) for _ in row or ()]
        own = [grid for _, grid in zip(row or (), grids, strict=False)]
        if len(own) == 1:
            told["image_grid_thw"] = own
        rows.append(told if row else {})
    return rows


def _upright(image: Any) -> Size | None:
    try:
        return image_size(image)
    except ImageFault:
        return None


def seen_sizes(processor: Any, fields: Mapping[str, Any], count: int) -> list[Size | None]:
    """(width, height) in pixels of each of `count` images as the processor resized it."""
    grids, pixels = fields.get("image_grid_thw"), fields.get("pixel_values")
    patch = getattr(getattr(processor, "image_processor", processor), "patch_size", None)
    if grids is not None and isinstance(patch, int):
        sizes = [(width * patch, height * patch) for _, height, width in _listed(grids)]
    elif pixels is not None and getattr(pixels, "ndim", 0) == 4 and len(pixels) == count:
        sizes = [(pixels.shape[3], pixels.shape[2])] * count
    else:
        sizes = []
    return sizes if len(sizes) == count else [None] * count


def _listed(grids: Any) -> list[list[int]]:
    return torch.as_tensor(grids).reshape(-1, 3).tolist()


def drawn_frames(functions: Sequence[Callable], rows: Sequence[dict[str, Any]]) -> list[str] | None:
    """What a picture of each row needs, as JSON: the frames its rewards read, and its image.

    {"answer", "solution": frames, "image", "seen": sizes, "index": which image}, "" for a row that
    names none of several images. None when no reward reads frames.
    """
    parts = [part for function in functions for part in parts_of(function)]
    framed = [part for part in parts if isinstance(part, Reward) and part.framed]
    if not framed or not rows:
        return None
    columns = {key: [row.get(key) for row in rows] for key in rows[0]}
    read = framed[0].frames_of(columns, len(rows))
    return [_drawn(frames, row) for frames, row in zip(read, rows, strict=True)]


def _drawn(frames: RowFrames, row: dict[str, Any]) -> str:
    try:
        (image, seen), *others = frames.sizes
    except BadColumn:
        return ""
    if others:
        return ""
    told = {"answer": frames.answer, "solution": frames.solution, "image": image, "seen": seen}
    return json.dumps(told | {"index": row.get("image_index") or 0})
