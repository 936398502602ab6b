# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6: a gated DeltaNet decoder under a tower that merges sixteen patches into one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

import torch
from packaging.version import Version

from fastgrpo.errors import InputError
from fastgrpo.models.family import Family, Vision
from fastgrpo.models.joined_processor import joined_processor
from fastgrpo.models.qwen3_5 import GatedDeltaNet
from fastgrpo.models.tiles import Tiles


class MiniCPMV46(GatedDeltaNet, Tiles):
    """`pixel_values` (1, channels, p, p times all patches): every image's patches side by side;
    `target_sizes` (n, 2) the rows and columns of each."""

    vision_inputs = ("pixel_values", "target_sizes")
    decoders = ("qwen3_5_text",)
    tiny_decoder = "qwen3_5_text"
    fits = Family.fits  # every image and slice stands between markers

    def check_config(self, config) -> None:
        if config.image_token_id is None or config.video_token_id is None:
            raise InputError("image_token_id and video_token_id must be in the config")

    def placeholders(self, config) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def merged(self, config) -> int:
        """Rows, and columns, of patches in one token."""
        return 2 ** (config.merger_times + (config.downsample_mode != "4x"))

    def image_tokens(self, image: Vision, config) -> int:
        return int(image["target_sizes"].prod()) // self.merged(config) ** 2

    def check_vision(self, vision: Vision) -> None:
        pixels, sizes = vision["pixel_values"], vision["target_sizes"]
        if pixels.ndim != 4 or len(pixels) != 1 or sizes.ndim != 2:
            raise InputError(
                f"pixel_values must be (1, channels, p, p patches) and target_sizes (n, 2), not "
                f"{tuple(pixels.shape)} and {tuple(sizes.shape)}"
            )
        patches, came = int(sizes.prod(1).sum()), pixels.shape[3] // pixels.shape[2]
        if patches != came:
            raise InputError(f"target_sizes counts {patches} patches, pixel_values has {came}")

    def split_images(self, vision: Vision) -> list[Vision]:
        pixels, sizes = vision["pixel_values"], vision["target_sizes"]
        parts = pixels.split((sizes.prod(1) * pixels.shape[2]).tolist(), 3)
        return [
            {"pixel_values": part, "target_sizes": size}
            for part, size in zip(parts, sizes.split(1), strict=True)
        ]

    def join_images(self, images: Sequence[Vision]) -> Vision:
        return {
            "pixel_values": torch.cat([image["pixel_values"] for image in images], 3),
            "target_sizes": torch.cat([image["target_sizes"] for image in images]),
        }

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        """`size`: rows and columns of patches, made whole tokens."""
        side, tower = self.merged(config), config.vision_config
        height, width = (-(-n // side) * side for n in size or (side, side))
        patch = tower.patch_size
        pixels = torch.zeros(1, tower.num_channels, patch, height * width * patch)
        return {"pixel_values": pixels, "target_sizes": torch.tensor([[height, width]])}

    def tiny_config(self, text, vision, ids, **top):
        fields = {"video_token_id": ids["video"], "insert_layer_id": 0} | top
        return super().tiny_config(text, vision, ids, **fields)

    def tiny_tower(self, text):
        return super().tiny_tower(text) | {"image_size": 32}

    def tiny_processor(self, config, tokenizer, **options):
        """The text MiniCPM's own processor writes; that needs torchvision."""
        from transformers import MiniCPMV4_6ImageProcessorPil

        tower, (start, end) = config.vision_config, self.tiny_markers
        pictures = MiniCPMV4_6ImageProcessorPil(
            patch_size=tower.patch_size,
            scale_resolution=tower.image_size,
            max_slice_nums=4,
            downsample_mode=config.downsample_mode,
        )

        def written(inputs: dict, i: int) -> str:
            counts = inputs["num_patches_per_image"]
            first = sum(counts[:i])
            sizes = torch.as_tensor(inputs["target_sizes"])[first : first + counts[i]]
            tokens = (self.image_tokens({"target_sizes": size}, config) for size in sizes)
            return "".join(start + self.tiny_image_text * n + end for n in tokens)

        return joined_processor(pictures, tokenizer, self.tiny_image_text, written, **options)

    tiny_markers = "(", ")"


# Before 5.23 its tower merges the windows of images of one size alone.
SERVED = Version(metadata.version("transformers")) >= Version("5.23")
FAMILIES = (MiniCPMV46("minicpmv4_6"),) if SERVED else ()
