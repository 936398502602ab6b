# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: a tower with windows; boxes in the pixels of the resized image."""

from fastgrpo.models.family import Coordinates
from fastgrpo.models.qwen2_vl import QwenVL


class Qwen25VL(QwenVL):
    """As Qwen2-VL but for the tower, the frame of its boxes, and the time between the frames of a
    video (`second_per_grid_ts`), which transformers cut to whole seconds before 5.23."""

    position_inputs = ("second_per_grid_ts",)

    coordinates = Coordinates(
        "pixels",
        "QwenLM/Qwen3-VL#782, by its authors: absolute, after resizing; arXiv 2502.13923",
    )

    def tiny_parts(self, text, vision):
        text, vision = super().tiny_parts(text, vision)
        tower = dict(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=text["hidden_size"],
            window_size=16,
            fullatt_block_indexes=[1],
        )
        return text, tower | vision


FAMILIES = (Qwen25VL("qwen2_5_vl"),)
