# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: as LLaVA-NeXT with at most so many tiles' worth of features; several pictures
in one prompt are not cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.models.family import Features, Join, Vision, filled
from fastgrpo.models.joined_processor import joined_processor
from fastgrpo.models.llava_next import LlavaNext, _grid, _unpadded


class LlavaOnevision(LlavaNext):
    """`batch_num_images` (prompts,) decides: the picture of a prompt that has one is cut into
    tiles, those of a prompt with several are not. The engine's unit is one prompt's pictures."""

    vision_inputs = ("pixel_values", "image_sizes", "batch_num_images")
    tiny_decoder = "qwen2"

    def placeholders(self, config) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def fits(self, runs: list[int], features: list[int]) -> bool:
        return sum(runs) == sum(features)  # a unit may be several runs

    def image_tokens(self, image: Vision, config) -> int:
        """Each picture's patches and a newline; of one alone the base picture's patches, then the
        grid's without its padding, shrunk to the most tiles, a newline after each row of them."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        count = int(image["batch_num_images"])
        rows, columns = _grid(image["image_sizes"][0], config)
        if count > 1 or rows * columns == 0:
            return count * (side**2 + 1)
        height, width = _unpadded(image["image_sizes"][0], rows * side, columns * side)
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * side**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
        return side**2 + height * (width + 1)

    def check_vision(self, vision: Vision) -> None:
        super().check_vision(vision)
        given, images = vision["batch_num_images"], len(vision["image_sizes"])
        if given.ndim != 1 or int(given.sum()) != images:
            raise InputError(
                f"batch_num_images {given.tolist()} must add up to the {images} images"
            )

    def split_images(self, vision: Vision) -> list[Vision]:
        counts = vision["batch_num_images"]
        sizes = counts.tolist()
        return [
            {"pixel_values": pixels, "image_sizes": where, "batch_num_images": count}
            for pixels, where, count in zip(
                vision["pixel_values"].split(sizes),
                vision["image_sizes"].split(sizes),
                counts.split(1),
                strict=True,
            )
            if len(pixels)
        ]

    def join_images(self, images: Sequence[Vision]) -> Vision:
        counts = torch.cat([image["batch_num_images"] for image in images])
        return super().join_images(images) | {"batch_num_images": counts}

    def image_counts(
        self, config, prompts: Sequence[Sequence[int]], vision: Vision, num_images: Sequence[int]
    ) -> list[int]:
        return [int(count > 0) for count in num_images]

    def split_features(self, output, images: Sequence[Vision]) -> tuple[list[Features], Join]:
        kind, pooled = type(output), iter(output.pooler_output)
        counts = [int(image["batch_num_images"]) for image in images]
        units = [[torch.cat([next(pooled) for _ in range(count)])] for count in counts]

        def join(features: Sequence[Features]):
            return filled(kind, pooler_output=[feature for (feature,) in features])

        return units, join

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        one = torch.ones(1, dtype=torch.int64)
        return super().blank_image(config, size) | {"batch_num_images": one}

    def blank_images(self, config, sizes: Sequence[tuple[int, int]]) -> list[Vision]:
        if len(sizes) < 2:
            return super().blank_images(config, sizes)
        unit = self.join_images([self.blank_image(config, size) for size in sizes])
        unit["batch_num_images"] = torch.tensor([len(sizes)])
        return [unit | {"pixel_values": unit["pixel_values"][:, :1]}]

    def tiny_config(self, text, vision, ids, **top):
        return super().tiny_config(text, vision, ids, video_token_id=ids["video"], **top)

    def tiny_tower(self, text):
        return super().tiny_tower(text) | {"model_type": "siglip_vision_model"}

    def tiny_top(self, text: dict, vision: dict) -> dict[str, Tensor]:
        pinpoints = {"image_grid_pinpoints": [[8 * i, 8 * j] for i in (1, 2, 6) for j in (1, 2, 6)]}
        return pinpoints | {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }

    def tiny_processor(self, config, tokenizer, **options):
        """The text of LlavaOnevisionProcessor, whose video half needs torchvision."""
        from transformers import LlavaOnevisionImageProcessorPil

        side = config.vision_config.image_size
        pictures = LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side}, image_grid_pinpoints=config.image_grid_pinpoints
        )

        def written(inputs: dict, i: int) -> str:
            alone = [n == 1 for n in inputs["batch_num_images"] for _ in range(n)]
            unit = {
                "image_sizes": torch.as_tensor(inputs["image_sizes"][i])[None],
                "batch_num_images": torch.tensor([1 if alone[i] else 2]),
            }
            tokens = self.image_tokens(unit, config)
            return "<image>" * (tokens if alone[i] else tokens // 2)

        return joined_processor(pictures, tokenizer, "<image>", written, **options)


FAMILIES = (LlavaOnevision("llava_onevision"),)
