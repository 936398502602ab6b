# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.7: MiniCPM-V 4.6 with positions on a canvas that an image shares with its slices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrpo.errors import InputError
from fastgrpo.models.family import Vision
from fastgrpo.models.minicpmv4_6 import SERVED, MiniCPMV46


class MiniCPMV47(MiniCPMV46):
    """Positions have a time, a height and a width axis; the markers around images and slices lie on
    the edges of the canvas, so that what follows a prompt must not be read as one of them."""

    axes = 3
    MARKERS = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")

    def check_config(self, config) -> None:
        super().check_config(config)
        missing = [name for name in self.MARKERS if getattr(config, name) is None]
        if missing:
            raise InputError(f"{missing[0]} must be in the config")

    def image_text(self, image: Vision, config) -> list[int]:
        return [config.image_start_id, *super().image_text(image, config), config.image_end_id]

    def positions(self, core: nn.Module, prompt_ids: Tensor, vision: Vision) -> Tensor:
        if not vision:
            return super().positions(core, prompt_ids, vision)
        self._check_end(core.config, prompt_ids.tolist())
        ids = torch.cat([prompt_ids, prompt_ids.new_zeros(1)])[None]  # and a token of text
        positions, _ = core.model.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == core.config.image_token_id).int(),
            target_sizes=vision["target_sizes"].cpu(),
        )
        return positions[:, 0]

    def _check_end(self, config, prompt_ids: list[int]) -> None:
        markers = {getattr(config, name) for name in self.MARKERS}
        last = next(token for token in reversed(prompt_ids) if token not in markers)
        if last == config.image_token_id:
            raise InputError(
                "prompt_ids end with an image: a completion that begins with a newline would move "
                "it; put text behind the image"
            )

    def stock_inputs(self, config, ids, vision, prompt=None) -> dict[str, Tensor]:
        return super().stock_inputs(config, ids, vision, prompt) | {
            "mm_token_type_ids": (ids == config.image_token_id).int()
        }

    def tiny_config(self, text, vision, ids, **top):
        text = self.tiny_mixers(text)
        rope = text["rope_parameters"]
        rotated = int(text["head_dim"] * rope["partial_rotary_factor"]) // 2
        side = rotated * 3 // 8
        section = {"mrope_interleaved": True, "mrope_section": [rotated - 2 * side, side, side]}
        markers = dict(zip(self.MARKERS, (ids["vision_start"], ids["vision_end"]), strict=False))
        free = range(ids["vision_end"] + 1, ids["vision_end"] + 4)
        markers |= dict(zip(self.MARKERS[2:], free, strict=True))
        text = text | {"rope_parameters": section | rope}
        return super().tiny_config(text, vision, ids, **(markers | top))

    tiny_markers = "<|image_start|>", "<|image_end|>"

    def tiny_tokens(self, config):
        start, end = self.tiny_markers
        return super().tiny_tokens(config) | {
            "image_start_token": (start, config.image_start_id),
            "image_end_token": (end, config.image_end_id),
        }


FAMILIES = (MiniCPMV47("minicpmv4_7"),) if SERVED else ()
