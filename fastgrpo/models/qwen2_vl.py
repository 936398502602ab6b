# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, and what all Qwen-VL generations share: patches with a grid, M-RoPE, one tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrpo.errors import InputError
from fastgrpo.models.family import Coordinates, Family, Vision


class QwenVL(Family):
    """Images are rows of patches (`pixel_values`) cut by `image_grid_thw`; positions have a time, a
    height and a width axis, and an image of h x w tokens advances them by max(h, w)."""

    vision_inputs = ("pixel_values", "image_grid_thw")
    axes = 3
    varlen_tower = True

    def placeholders(self, config) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def image_tokens(self, image: Vision, config) -> int:
        return int(image["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2

    def image_text(self, image: Vision, config) -> list[int]:
        inside = [config.image_token_id] * self.image_tokens(image, config)
        return [config.vision_start_token_id, *inside, config.vision_end_token_id]

    def positions(self, core: nn.Module, prompt_ids: Tensor, vision: Vision) -> Tensor:
        if not vision:
            return super().positions(core, prompt_ids, vision)
        positions, _ = core.model.get_rope_index(
            input_ids=prompt_ids[None],
            mm_token_type_ids=self._kinds(core.config, prompt_ids[None]),
            image_grid_thw=vision["image_grid_thw"].cpu(),
        )
        return positions[:, 0]

    def stock_inputs(self, config, ids: Tensor, vision: Vision) -> dict[str, Tensor]:
        return super().stock_inputs(config, ids, vision) | {
            "mm_token_type_ids": self._kinds(config, ids)
        }

    def _kinds(self, config, ids: Tensor) -> Tensor:
        return (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()

    def check_vision(self, vision: Vision) -> None:
        grid, pixels = vision["image_grid_thw"], vision["pixel_values"]
        if grid.ndim != 2 or grid.shape[1] != 3:
            raise InputError(f"image_grid_thw must be (n, 3), not {tuple(grid.shape)}")
        patches = int(grid.prod(1).sum())
        if patches != len(pixels):
            raise InputError(
                f"image_grid_thw counts {patches} patches, pixel_values has {len(pixels)}"
            )

    def split_images(self, vision: Vision) -> list[Vision]:
        grid = vision["image_grid_thw"]
        patches = vision["pixel_values"].split(grid.prod(1).tolist())
        return [
            {"pixel_values": pixels, "image_grid_thw": where}
            for pixels, where in zip(patches, grid.split(1), strict=True)
        ]

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        """`size`: rows and columns of patches."""
        vision = config.vision_config
        height, width = size or (vision.spatial_merge_size, vision.spatial_merge_size)
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.zeros(height * width, channels),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }

    def tower(self, core: nn.Module) -> nn.Module:
        return core.model.visual

    def tiny_config(self, text: dict, vision: dict, ids: dict[str, int], **top):
        from transformers import AutoConfig

        text, vision = self.tiny_parts(text, vision)
        rope = text["rope_parameters"]
        if "mrope_section" not in rope:
            rotated = int(text["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
            side = rotated * 3 // 8
            text["rope_parameters"] = rope | {"mrope_section": [rotated - 2 * side, side, side]}
        special = {f"{name}_token_id": value for name, value in ids.items()}
        return AutoConfig.for_model(
            self.name, text_config=text, vision_config=vision, **(special | top)
        )

    def tiny_parts(self, text: dict, vision: dict) -> tuple[dict, dict]:
        """This generation's fields of the two sub-configs, those given on top."""
        text = {"head_dim": text["hidden_size"] // text["num_attention_heads"]} | text
        base = dict(depth=3, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_heads=2)
        return text, base | vision

    tiny_image_text = "<|vision_start|><|image_pad|><|vision_end|>"

    def tiny_tokens(self, config):
        return {
            "vision_start_token": ("<|vision_start|>", config.vision_start_token_id),
            "vision_end_token": ("<|vision_end|>", config.vision_end_token_id),
            "image_token": ("<|image_pad|>", config.image_token_id),
            "video_token": ("<|video_pad|>", config.video_token_id),
        }

    def tiny_processor(self, config, tokenizer, **options):
        """PaddleOCRVLProcessor joins an image processor and a tokenizer as Qwen2_5_VLProcessor
        does, without the video half, which needs torchvision."""
        from transformers import PaddleOCRVLProcessor, Qwen2VLImageProcessorPil

        vision = config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            size={"shortest_edge": side * side, "longest_edge": 64 * side * side},
        )
        return PaddleOCRVLProcessor(image_processor, tokenizer, **options)


class Qwen2VL(QwenVL):
    """Boxes were taught in thousandths."""

    coordinates = Coordinates(
        "thousandths", "Qwen2-VL technical report, arXiv 2409.12191: normalised to [0, 1000)"
    )

    def tiny_parts(self, text, vision):
        text, vision = super().tiny_parts(text, vision)
        return text, dict(embed_dim=16, hidden_size=text["hidden_size"], mlp_ratio=2) | vision


FAMILIES = (Qwen2VL("qwen2_vl"),)
