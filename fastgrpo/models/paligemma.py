# SPDX-License-Identifier: Apache-2.0
"""PaliGemma: every token of a prompt sees the whole prompt; completions are causal."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.models.family import Coordinates, Vision
from fastgrpo.models.joined_processor import joined_processor
from fastgrpo.models.tiles import Tiles


class PaliGemma(Tiles):
    """A prefix language model: the prompt is one block. Positions count from 1.

    PaliGemma 2 is not served: its Gemma 2 decoder caps attention scores.
    """

    coordinates = Coordinates(
        "1024ths",
        "google-research/big_vision, configs/proj/paligemma/README.md: <loc0000> to <loc1023>; "
        "y first in its detection examples",
        order="yxyx",
    )
    decoders = ("gemma",)
    tiny_decoder = "gemma"

    def image_tokens(self, image: Vision, config) -> int:
        tower = config.vision_config
        return (tower.image_size // tower.patch_size) ** 2

    def positions(self, core, prompt_ids: Tensor, vision: Vision) -> Tensor:
        return super().positions(core, prompt_ids, vision) + 1

    def two_way(self, config) -> bool:
        return True

    def blocks(self, config, prompt_ids: Tensor) -> list[tuple[int, int]]:
        return [(0, prompt_ids.numel())]

    def stock_inputs(self, config, ids, vision, prompt=None) -> dict[str, Tensor]:
        after = torch.arange(ids.shape[-1]) >= (ids.shape[-1] if prompt is None else prompt)
        types = after.long().expand_as(ids)
        return super().stock_inputs(config, ids, vision, prompt) | {"token_type_ids": types}

    def tiny_config(self, text, vision, ids, **top):
        from transformers import AutoConfig

        text = {"model_type": self.tiny_decoder, "head_dim": 8} | text
        tower = {"model_type": "siglip_vision_model", "vision_use_head": False}
        return AutoConfig.for_model(
            self.name,
            text_config=text,
            vision_config=self.tiny_tower(text) | tower | vision,
            **({"image_token_index": ids["image"], "projection_dim": text["hidden_size"]} | top),
        )

    def tiny_processor(self, config, tokenizer, **options):
        """The text PaliGemmaProcessor makes where the image's place is in it."""
        from transformers import SiglipImageProcessorPil

        side = config.vision_config.image_size
        pictures = SiglipImageProcessorPil(size={"height": side, "width": side})
        text = "<image>" * self.image_tokens({}, config)
        return joined_processor(pictures, tokenizer, "<image>", lambda inputs, i: text, **options)


FAMILIES = (PaliGemma("paligemma"),)
