# SPDX-License-Identifier: Apache-2.0
"""What a model says of boxes and saw of its images: the frame it writes in, the sizes of each row.

The columns are those of `fastgrpo.rewards.geometry.frames`; a column of the data set of the same
name is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastgrpo.models.registry import families

# The registry imports this module, also where the packages of images and rewards are missing: they
# are imported by the functions that need them.
if TYPE_CHECKING:
    from fastgrpo.rewards.geometry.frames import Size

# A family's convention, as `Coordinates` names it, in the words of the rewards.
_FRAMES = {
    ("pixels", "xyxy"): "seen",
    ("thousandths", "xyxy"): "thousandths",
    ("thousandths", "yxyx"): "thousandths_yx",
    ("1024ths", "yxyx"): "locations",
}


def model_frame(config: Any) -> str | None:
    """The frame the family of a model config writes boxes in.

    "unstated" for a vision model whose family states none, None for a model without vision.
    """
    from fastgrpo.rewards.geometry.frames import UNSTATED

    family = families().get(getattr(config, "model_type", None))
    stated = family and family.coordinates
    if stated is not None:
        return _FRAMES[stated.frame, stated.order]
    return UNSTATED if getattr(config, "vision_config", None) is not None else None


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
    from fastgrpo.images import ImageFault, image_size

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
    grids = grids if isinstance(grids, Tensor) else np.asarray(grids)
    return grids.reshape(-1, 3).tolist()
