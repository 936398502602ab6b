# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and Ministral 3: pictures of any size on a Pixtral tower, padded to the largest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from fastgrpo.errors import InputError
from fastgrpo.models.family import Vision
from fastgrpo.models.joined_processor import joined_processor
from fastgrpo.models.tiles import Tiles


class Mistral3(Tiles):
    """`image_sizes` (n, 2) are the pixels of each picture that are its own; its rows of features
    are separated by tokens of their own in the text."""

    vision_inputs = ("pixel_values", "image_sizes")
    decoders = ("mistral", "ministral3")
    tiny_decoder = "mistral"
    coordinates = None  # its card states none; Mistral's cookbook for boxes is for a later model

    def image_tokens(self, image: Vision, config) -> int:
        side = config.vision_config.patch_size * config.spatial_merge_size
        return int((image["image_sizes"] // side).prod())

    def fits(self, runs: list[int], features: list[int]) -> bool:
        return sum(runs) == sum(features)  # a run is a row of an image

    def check_vision(self, vision: Vision) -> None:
        super().check_vision(vision)
        sizes, pixels = vision["image_sizes"], vision["pixel_values"]
        if sizes.shape != (len(pixels), 2):
            raise InputError(f"image_sizes must be ({len(pixels)}, 2), not {tuple(sizes.shape)}")

    def split_images(self, vision: Vision) -> list[Vision]:
        images = super().split_images(vision)
        for image in images:
            height, width = image["image_sizes"][0].tolist()
            image["pixel_values"] = image["pixel_values"][..., :height, :width]
        return images

    def join_images(self, images: Sequence[Vision]) -> Vision:
        sizes = torch.cat([image["image_sizes"] for image in images])
        height, width = sizes.amax(0).tolist()
        pixels = [
            pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
            for x in (image["pixel_values"] for image in images)
        ]
        return {"pixel_values": torch.cat(pixels), "image_sizes": sizes}

    def company(self, config, images: Sequence[Vision]) -> list[Vision]:
        """Of a picture of one token, itself: transformers squeezes the features of a batch with
        one, (1, D) to (D,), and then fails to split them."""
        alone = len(images) == 1 and self.image_tokens(images[0], config) == 1
        return list(images) if alone else []

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        """`size`: rows and columns of patches. The smallest has two tokens, see `company`."""
        merge, patch = config.spatial_merge_size, config.vision_config.patch_size
        height, width = size or (merge, 2 * merge)
        pixels = torch.zeros(1, config.vision_config.num_channels, height * patch, width * patch)
        return {
            "pixel_values": pixels,
            "image_sizes": torch.tensor([[height * patch, width * patch]]),
        }

    def tiny_tower(self, text):
        head = {"head_dim": 8, "image_size": 64}
        return super().tiny_tower(text) | head | {"model_type": "pixtral"}

    def tiny_top(self, text, vision):
        return {"spatial_merge_size": 2, "vision_feature_layer": -1}

    tiny_image_text = "[IMG]"

    def tiny_tokens(self, config):
        return super().tiny_tokens(config) | {
            "image_break_token": ("[IMG_BREAK]", None),
            "image_end_token": ("[IMG_END]", None),
        }

    def tiny_processor(self, config, tokenizer, **options):
        """The text of PixtralProcessor, which itself needs torchvision."""
        from transformers import PixtralImageProcessorPil

        side = config.vision_config.patch_size * config.spatial_merge_size

        def written(inputs: dict, i: int) -> str:
            height, width = (int(n) // side for n in inputs["image_sizes"][i])
            return "[IMG_BREAK]".join(["[IMG]" * width] * height) + "[IMG_END]"

        pictures = PixtralImageProcessorPil(
            patch_size={"height": side, "width": side}, size={"longest_edge": 4 * side}
        )
        return joined_processor(pictures, tokenizer, "[IMG]", written, **options)


FAMILIES = (Mistral3("mistral3"),)
