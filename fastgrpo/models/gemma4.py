# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: patches of any aspect, two head sizes, shared keys and values, embeddings a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastgrpo.errors import InputError
from fastgrpo.models.family import Vision
from fastgrpo.models.gemma3 import Gemma3Text, token_runs
from fastgrpo.models.joined_processor import joined_processor
from fastgrpo.models.tiles import Tiles


class Gemma4Text(Gemma3Text):
    """The decoder: sliding layers with small heads, global ones with large; the last layers take
    the keys and values of earlier ones."""

    def check_config(self, config) -> None:
        text = getattr(config, "text_config", None) or config
        if text.use_bidirectional_attention == "all":
            super().check_config(config)

    def check_training(self, core: nn.Module) -> None:
        if not core.config.get_text_config().num_kv_shared_layers:
            return
        for layer in core.get_decoder().layers:
            options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
            if getattr(layer, "gradient_checkpointing", False) and options.get("use_reentrant"):
                raise InputError(
                    "use_reentrant=True: the layers that share keys and values take them around "
                    "the checkpoint, so their gradient is lost, with packing and without; "
                    "checkpoint with use_reentrant=False"
                )

    def head_dim(self, text) -> int:
        return max(layer.head_dim for layer in text.per_layer_config)

    def tiny_text(self, text: dict) -> dict:
        """Two layers of each kind; the last two share the others' keys and values."""
        rope = {"rope_type": "default", "rope_theta": 1e4}
        wide = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4}
        fields = {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,  # the norm of 4 numbers multiplies rounding by 20
            "vocab_size_per_layer_input": text["vocab_size"],
            "final_logit_softcapping": 6.0,
            "use_bidirectional_attention": "vision",
            **text,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {"sliding_attention": rope, "full_attention": wide},
        }
        return fields


class Gemma4(Gemma4Text, Tiles):
    """`pixel_values` (n, patches, 3 p p) padded to the most patches, `image_position_ids` (n,
    patches, 2) their places, -1 for padding. Where the config says "vision", an image's features
    see one another both ways in sliding layers, inside the window."""

    vision_inputs = ("pixel_values", "image_position_ids")
    decoders = ("gemma4_text",)
    tiny_decoder = "gemma4_text"
    local_blocks = True

    def placeholders(self, config) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id, config.audio_token_id

    def image_tokens(self, image: Vision, config) -> int:
        patches = int((image["image_position_ids"][0, :, 0] >= 0).sum())
        return patches // config.vision_config.pooling_kernel_size**2

    def image_text(self, image: Vision, config) -> list[int]:
        inside = [config.image_token_id] * self.image_tokens(image, config)
        return [config.boi_token_id, *inside, config.eoi_token_id]

    def two_way(self, config) -> bool:
        return config.text_config.use_bidirectional_attention == "vision"

    def blocks(self, config, prompt_ids: Tensor) -> list[tuple[int, int]]:
        return token_runs(prompt_ids, config.image_token_id) if self.two_way(config) else []

    def stock_inputs(self, config, ids, vision, prompt=None) -> dict[str, Tensor]:
        types = (ids == config.image_token_id).long()
        return super().stock_inputs(config, ids, vision, prompt) | {"mm_token_type_ids": types}

    def check_vision(self, vision: Vision) -> None:
        pixels, places = vision["pixel_values"], vision["image_position_ids"]
        if pixels.ndim != 3 or places.shape != (*pixels.shape[:2], 2):
            raise InputError(
                f"pixel_values must be (n, patches, values) and image_position_ids (n, patches, "
                f"2), not {tuple(pixels.shape)} and {tuple(places.shape)}"
            )

    def split_images(self, vision: Vision) -> list[Vision]:
        images = super().split_images(vision)
        for image in images:
            patches = int((image["image_position_ids"][0, :, 0] >= 0).sum())  # padding is last
            for name in self.vision_inputs:
                image[name] = image[name][:, :patches]
        return images

    def join_images(self, images: Sequence[Vision]) -> Vision:
        kinds = sorted({str(image["pixel_values"].dtype) for image in images})
        if len(kinds) > 1:
            raise InputError(
                f"pixel_values come in {' and '.join(kinds)}, and the tower computes in the dtype "
                f"of each: give all of a batch in one"
            )
        most = max(image["pixel_values"].shape[1] for image in images)

        def padded(name: str, value: int) -> Tensor:
            rows = (image[name] for image in images)
            return torch.cat([pad(x, (0, 0, 0, most - x.shape[1]), value=value) for x in rows])

        return {
            "pixel_values": padded("pixel_values", 0),
            "image_position_ids": padded("image_position_ids", -1),
        }

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        """`size`: rows and columns of patches."""
        tower = config.vision_config
        height, width = size or (tower.pooling_kernel_size, tower.pooling_kernel_size)
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
        pixels = torch.zeros(1, height * width, 3 * tower.patch_size**2)
        return {"pixel_values": pixels, "image_position_ids": places[None]}

    def tower(self, core: nn.Module) -> nn.Module:
        return core.model.vision_tower

    def tiny_config(self, text, vision, ids, **top):
        from transformers import AutoConfig

        tower = dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            patch_size=4,
            pooling_kernel_size=2,
            position_embedding_size=256,
        )
        special = {
            "image_token_id": ids["image"],
            "video_token_id": ids["video"],
            "boi_token_id": ids["vision_start"],
            "eoi_token_id": ids["vision_end"],
            "audio_token_id": 105,
        }
        return AutoConfig.for_model(
            self.name,
            text_config=self.tiny_text(text),
            vision_config=tower | vision,
            **(special | top),
        )

    tiny_image_text = "<|image|>"

    def tiny_tokens(self, config):
        return super().tiny_tokens(config) | {
            "boi_token": ("<|image>", config.boi_token_id),
            "eoi_token": ("<image|>", config.eoi_token_id),
        }

    def tiny_processor(self, config, tokenizer, **options):
        """The text of Gemma4Processor, whose video half needs torchvision; its images have 70
        tokens at least."""
        from transformers import Gemma4ImageProcessorPil

        tower = config.vision_config
        pictures = Gemma4ImageProcessorPil(
            patch_size=tower.patch_size,
            pooling_kernel_size=tower.pooling_kernel_size,
            max_soft_tokens=70,
        )

        def written(inputs: dict, i: int) -> str:
            return f"<|image>{'<|image|>' * inputs['num_soft_tokens_per_image'][i]}<image|>"

        return joined_processor(pictures, tokenizer, "<|image|>", written, types=True, **options)


FAMILIES = (Gemma4("gemma4"), Gemma4Text("gemma4_text"))
