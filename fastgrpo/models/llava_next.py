# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: a picture and its tiles of the best-fitting grid, put together again and unpadded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.models.family import Vision
from fastgrpo.models.llava import Llava
from fastgrpo.models.tiles import Tiles


class LlavaNext(Llava):
    """`pixel_values` (n, tiles, channels, height, width) padded to the most tiles, `image_sizes`
    (n, 2) the pictures' own."""

    vision_inputs = ("pixel_values", "image_sizes")

    def image_tokens(self, image: Vision, config) -> int:
        """The base picture's patches, then the grid's without its padding, a newline after each
        row of them."""
        tower = config.vision_config
        side = tower.image_size // tower.patch_size
        base = side**2 + (config.vision_feature_select_strategy == "full") * self.has_class_token(
            tower
        )
        rows, columns = _grid(image["image_sizes"][0], config)
        if rows * columns == 0:
            return base + 1
        height, width = _unpadded(image["image_sizes"][0], rows * side, columns * side)
        return base + height * (width + 1)

    def check_vision(self, vision: Vision) -> None:
        pixels, sizes = vision["pixel_values"], vision["image_sizes"]
        if pixels.ndim != 5:
            raise InputError(
                f"pixel_values must be (n, tiles, channels, height, width), not "
                f"{tuple(pixels.shape)}"
            )
        if sizes.shape != (len(pixels), 2):
            raise InputError(f"image_sizes must be ({len(pixels)}, 2), not {tuple(sizes.shape)}")

    def join_images(self, images: Sequence[Vision]) -> Vision:
        most = max(image["pixel_values"].shape[1] for image in images)
        padded = [_with_tiles(image["pixel_values"], most) for image in images]
        return {
            "pixel_values": torch.cat(padded),
            "image_sizes": torch.cat([image["image_sizes"] for image in images]),
        }

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        """`size`: rows and columns of patches of the picture before it is cut."""
        blank = Tiles.blank_image(self, config)["pixel_values"]
        patch = config.vision_config.patch_size
        height, width = size or (1, 1)
        sizes = torch.tensor([[height * patch, width * patch]])
        rows, columns = _grid(sizes[0], config)
        return {
            "pixel_values": blank[None].repeat(1, 1 + rows * columns, 1, 1, 1),
            "image_sizes": sizes,
        }

    def tiny_tower(self, text):
        return super().tiny_tower(text) | {"image_size": 8}

    def tiny_top(self, text, vision):
        return super().tiny_top(text, vision) | {
            "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]
        }

    def tiny_pictures(self, config):
        return {"image_grid_pinpoints": config.image_grid_pinpoints}


def _grid(size: Tensor, config) -> tuple[int, int]:
    """Rows and columns of tiles of a picture of this size."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    side = config.vision_config.image_size
    return get_anyres_image_grid_shape(size.tolist(), config.image_grid_pinpoints, side)


def _unpadded(size: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of patches that are the picture's, as the model's `unpad_image` cuts."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    return tuple(unpad_image(torch.empty(1, rows, columns, device="meta"), size.tolist()).shape[1:])


def _with_tiles(pixels: Tensor, count: int) -> Tensor:
    missing = count - pixels.shape[1]
    return torch.cat([pixels, pixels.new_zeros(len(pixels), missing, *pixels.shape[2:])], 1)


FAMILIES = (LlavaNext("llava_next"),)
