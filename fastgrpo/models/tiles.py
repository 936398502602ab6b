# SPDX-License-Identifier: Apache-2.0
"""What the families share whose images are a batch of equally large pictures or tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.errors import InputError
from fastgrpo.models.family import Family, Features, Join, Vision, filled

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


class Tiles(Family):
    """`pixel_values` is (n, channels, height, width), and every tile takes as many placeholders.

    The engine's unit is the tile: an image cut into several has their features one after another in
    one run of placeholders.
    """

    vision_inputs: tuple[str, ...] = ("pixel_values",)
    count_inputs = ("num_tiles",)
    decoders = DECODERS
    tiny_decoder = "qwen2"

    def placeholders(self, config) -> tuple[int, ...]:
        return (config.image_token_id,)

    def image_text(self, image: Vision, config) -> list[int]:
        return [config.image_token_id] * self.image_tokens(image, config)

    def fits(self, runs: list[int], features: list[int]) -> bool:
        left = list(features)
        for run in runs:
            while run > 0 and left:
                run -= left.pop(0)
            if run:
                return False
        return not left

    def check_vision(self, vision: Vision) -> None:
        if vision["pixel_values"].ndim != 4:
            shape = tuple(vision["pixel_values"].shape)
            raise InputError(f"pixel_values must be (n, channels, height, width), not {shape}")

    def split_images(self, vision: Vision) -> list[Vision]:
        return [
            dict(zip(vision, parts, strict=True))
            for parts in zip(*(value.split(1) for value in vision.values()), strict=True)
        ]

    def split_rows(
        self, fields: Mapping[str, Any], num_images: Sequence[int] | None, num_rows: int
    ) -> list[Vision]:
        """TRL's `num_tiles` holds the tiles of each row where an image may have several."""
        fields = dict(fields)
        tiles = fields.pop("num_tiles", None)
        return super().split_rows(fields, num_images if tiles is None else tiles, num_rows)

    def image_counts(
        self, config, prompts: Sequence[Sequence[int]], vision: Vision, num_images: Sequence[int]
    ) -> list[int]:
        """Tiles, where there are more of them than images: as many as the prompt has room for."""
        images = self.split_images(vision) if vision else []
        units = [self.image_tokens(unit, config) for unit in images]
        if len(units) == sum(num_images):
            return list(num_images)
        counts, left = [], iter(units)
        for ids in prompts:
            room, count = list(ids).count(config.image_token_id), 0
            while room > 0 and (tokens := next(left, 0)):
                room, count = room - tokens, count + 1
            counts.append(count)
        return counts

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        side = config.vision_config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        channels = config.vision_config.num_channels
        return {"pixel_values": torch.zeros(1, channels, height, width)}

    def tower(self, core: nn.Module) -> nn.Module:
        return core.model.vision_tower

    def split_features(self, output, images: Sequence[Vision]) -> tuple[list[Features], Join]:
        kind, pooled = type(output), output.pooler_output
        stacked = isinstance(pooled, Tensor)

        def join(features: Sequence[Features]):
            parts = [feature for (feature,) in features]
            return filled(kind, pooler_output=torch.stack(parts) if stacked else parts)

        return [[feature] for feature in pooled], join

    def tiny_config(self, text: dict, vision: dict, ids: dict[str, int], **top):
        from transformers import AutoConfig

        text = {"model_type": self.tiny_decoder} | text
        fields = {"image_token_id": ids["image"]} | self.tiny_top(text, vision) | top
        return AutoConfig.for_model(
            self.name, text_config=text, vision_config=self.tiny_tower(text) | vision, **fields
        )

    def tiny_tower(self, text: dict) -> dict:
        """This family's small tower."""
        return dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )

    def tiny_top(self, text: dict, vision: dict) -> dict:
        """This family's fields beside the two sub-configs."""
        return {}

    tiny_image_text = "<image>"

    def tiny_tokens(self, config):
        return {"image_token": (self.tiny_image_text, config.image_token_id)}
