# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, and what all Qwen-VL generations share: patches with a grid, M-RoPE, one tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrpo.errors import InputError
from fastgrpo.models.family import Coordinates, Family, Vision


class QwenVL(Family):
    """Images are rows of patches (`pixel_values`) cut by `image_grid_thw`, and so are videos;
    positions have a time, a height and a width axis, and a picture of h x w tokens advances those
    of the text after it by max(h, w), however long a video is."""

    vision_inputs = ("pixel_values", "image_grid_thw")
    video_inputs = ("pixel_values_videos", "video_grid_thw")
    axes = 3
    varlen_tower = True

    def placeholders(self, config) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def image_tokens(self, image: Vision, config) -> int:
        return int(image["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2

    def video_runs(self, video: Vision, config) -> list[int]:
        """One run; Qwen3-VL and later write every frame as a run of its own."""
        return [int(video["video_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2]

    def image_text(self, image: Vision, config) -> list[int]:
        inside = [config.image_token_id] * self.image_tokens(image, config)
        return [config.vision_start_token_id, *inside, config.vision_end_token_id]

    def positions(self, core: nn.Module, prompt_ids: Tensor, vision: Vision) -> Tensor:
        if not vision:
            return super().positions(core, prompt_ids, vision)
        given = ("image_grid_thw", "video_grid_thw", *self.position_inputs)
        text = prompt_ids.new_zeros(1)
        positions, _ = core.model.get_rope_index(
            input_ids=torch.cat([prompt_ids, text])[None],
            mm_token_type_ids=torch.cat([self._kinds(core.config, prompt_ids), text.int()])[None],
            **{key: vision[key].cpu() for key in given if key in vision},
        )
        return positions[:, 0]

    serves_images_in_completions = True

    def completion_positions(self, core, prompt_ids, vision, completion, own) -> Tensor:
        names = {*vision, *own}
        whole = {n: torch.cat([v[n] for v in (vision, own) if n in v]) for n in names}
        ids = torch.cat([prompt_ids, completion])
        return self.positions(core, ids, whole)[:, prompt_ids.numel() : -1]

    def stock_inputs(self, config, ids, vision, prompt=None) -> dict[str, Tensor]:
        return super().stock_inputs(config, ids, vision, prompt) | {
            "mm_token_type_ids": self._kinds(config, ids)
        }

    def _kinds(self, config, ids: Tensor) -> Tensor:
        return (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()

    def check_vision(self, vision: Vision) -> None:
        for pixels, grid in filter(None, (self.vision_inputs, self.video_inputs)):
            if grid not in vision:
                continue
            where = vision[grid]
            if where.ndim != 2 or where.shape[1] != 3:
                raise InputError(f"{grid} must be (n, 3), not {tuple(where.shape)}")
            counted, came = int(where.prod(1).sum()), len(vision[pixels])
            if counted != came:
                raise InputError(f"{grid} counts {counted} patches, {pixels} has {came}")

    def split_images(self, vision: Vision) -> list[Vision]:
        return _split(vision, *self.vision_inputs)

    def split_videos(self, vision: Vision) -> list[Vision]:
        return _split(vision, *self.video_inputs)

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        """`size`: rows and columns of patches."""
        vision = config.vision_config
        height, width = size or (vision.spatial_merge_size, vision.spatial_merge_size)
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.zeros(height * width, channels),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }

    def blank_video(self, config, size: tuple[int, int, int]) -> Vision:
        """`size`: frames (after the tower's merging in time), rows and columns of patches."""
        frames, *sides = size
        image = self.blank_image(config, sides)["pixel_values"]
        return {
            "pixel_values_videos": image.repeat(frames, 1),
            "video_grid_thw": torch.tensor([size]),
        }

    def video_text(self, video: Vision, config) -> list[int]:
        """The ids a processor writes for one video; what stands between its runs is free text."""
        marked = [
            [
                config.vision_start_token_id,
                *[config.video_token_id] * run,
                config.vision_end_token_id,
            ]
            for run in self.video_runs(video, config)
        ]
        return [token for run in marked for token in run]

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


def _split(vision: Vision, pixels: str, grid: str) -> list[Vision]:
    where = vision[grid]
    patches = vision[pixels].split(where.prod(1).tolist())
    return [{pixels: p, grid: g} for p, g in zip(patches, where.split(1), strict=True)]


class Qwen2VL(QwenVL):
    """Boxes were taught in thousandths."""

    coordinates = Coordinates(
        "thousandths",
        "QwenLM/Qwen3-VL qwen-vl-finetune/tools/process_bbox.ipynb; arXiv 2409.12191: [0, 1000)",
    )

    def tiny_parts(self, text, vision):
        text, vision = super().tiny_parts(text, vision)
        return text, dict(embed_dim=16, hidden_size=text["hidden_size"], mlp_ratio=2) | vision


FAMILIES = (Qwen2VL("qwen2_vl"),)
