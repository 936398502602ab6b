# SPDX-License-Identifier: Apache-2.0
"""SmolVLM and Idefics3: tiles by prompt and number, each a run of placeholders of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastgrpo.errors import InputError
from fastgrpo.models.family import Family, Features, Join, Vision, filled
from fastgrpo.models.tiles import Tiles


class SmolVLM(Tiles):
    """`pixel_values` (prompts, tiles, channels, height, width) with `pixel_attention_mask` over
    the pixels; an all-zero tile is padding to the model and is dropped here as there."""

    vision_inputs = ("pixel_values", "pixel_attention_mask")
    tiny_decoder = "llama"
    coordinates = None  # its card and Idefics3's state none
    fits = Family.fits  # every tile is a run of its own

    def image_tokens(self, image: Vision, config) -> int:
        tower = config.vision_config
        return (tower.image_size // tower.patch_size) ** 2 // config.scale_factor**2

    def check_vision(self, vision: Vision) -> None:
        pixels, mask = vision["pixel_values"], vision["pixel_attention_mask"]
        if pixels.ndim != 5 or mask.shape != (*pixels.shape[:2], *pixels.shape[3:]):
            raise InputError(
                f"pixel_values must be (prompts, tiles, channels, height, width) and "
                f"pixel_attention_mask (prompts, tiles, height, width), not "
                f"{tuple(pixels.shape)} and {tuple(mask.shape)}"
            )

    def split_images(self, vision: Vision) -> list[Vision]:
        pixels, mask = (vision[key].flatten(0, 1) for key in self.vision_inputs)
        return [
            {"pixel_values": pixels[i][None, None], "pixel_attention_mask": mask[i][None, None]}
            for i in pixels.flatten(1).any(1).nonzero()[:, 0].tolist()
        ]

    def join_images(self, images: Sequence[Vision]) -> Vision:
        return {key: torch.cat([image[key] for image in images], 1) for key in images[0]}

    def split_rows(
        self, fields: Mapping[str, Any], num_images: Sequence[int] | None, num_rows: int
    ) -> list[Vision]:
        given = {key: fields[key] for key in self.vision_inputs if fields.get(key) is not None}
        if not given:
            return super().split_rows(fields, num_images, num_rows)
        rows = [{key: value[i : i + 1] for key, value in given.items()} for i in range(num_rows)]
        images = [self.split_images(row) for row in rows]
        return [self.join_images(row) if row else {} for row in images]

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        """Grey, since the model drops a black one."""
        pixels = super().blank_image(config)["pixel_values"][None] + 1.0
        mask = torch.ones(1, 1, *pixels.shape[3:], dtype=torch.bool)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    def tower(self, core: nn.Module) -> nn.Module:
        return core.model.vision_model

    def split_features(self, output, images: Sequence[Vision]) -> tuple[list[Features], Join]:
        if isinstance(output.pooler_output, torch.Tensor):  # 5.17: (tiles, tokens, D)
            return super().split_features(output, images)
        kind, pooled = type(output), torch.cat(output.pooler_output)  # (tiles * tokens, D)

        def join(features: Sequence[Features]):
            return filled(kind, pooler_output=[feature for (feature,) in features])

        return [[tile] for tile in pooled.tensor_split(len(images))], join

    def tiny_tower(self, text: dict) -> dict:
        return super().tiny_tower(text) | {"image_size": 16}

    def tiny_top(self, text, vision):
        return {"scale_factor": 2}

    def tiny_tokens(self, config):
        return super().tiny_tokens(config) | {
            "fake_image_token": ("<fake_token_around_image>", None),
            "end_of_utterance_token": ("<end_of_utterance>", None),
        }

    def tiny_processor(self, config, tokenizer, **options):
        """Idefics3Processor for both: SmolVLM's has a video half, which needs torchvision."""
        from transformers import Idefics3Processor

        # transformers 5.17 exports it only where there is torchvision, which it does not use.
        from transformers.models.idefics3.image_processing_pil_idefics3 import (
            Idefics3ImageProcessorPil,
        )

        side = config.vision_config.image_size
        pictures = Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}
        )
        tokens = self.image_tokens({}, config)
        return Idefics3Processor(pictures, tokenizer, image_seq_len=tokens, **options)


FAMILIES = (SmolVLM("smolvlm"), SmolVLM("idefics3"))
