# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: an image's 256 features see one another both ways; five of six layers are local."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.models.family import Family, Vision
from fastgrpo.models.tiles import Tiles


def token_runs(ids: Tensor, token: int) -> list[tuple[int, int]]:
    """Bounds of the runs of `token`."""
    inside = torch.zeros(ids.numel() + 2, dtype=torch.int8)
    inside[1:-1] = ids == token
    step = inside.diff()
    starts, ends = (step == 1).nonzero()[:, 0], (step == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


class Gemma3Text(Family):
    """The decoder alone: causal, with a sliding window where the layer says so."""

    def check_config(self, config) -> None:
        text = getattr(config, "text_config", None) or config
        if getattr(text, "use_bidirectional_attention", False):
            raise InputError(
                "use_bidirectional_attention: every token sees both ways, so a completion cannot "
                "be scored token after token"
            )

    def tiny_text(self, text: dict) -> dict:
        """Local and global layers in turn; the window is longer than a tiny image."""
        layers = text["num_hidden_layers"]
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        rope = {"rope_type": "default", "rope_theta": 1e4}
        return {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 12,
            "layer_types": kinds,
            **text,
            "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        }

    def tiny_config(self, text, vision, ids, **top):
        return super().tiny_config(self.tiny_text(text), vision, ids, **top)


class Gemma3(Gemma3Text, Tiles):
    """Placeholders of one image are one block."""

    decoders = ("gemma3_text",)
    coordinates = None  # its card states none (google/gemma-3-4b-it, discussion 38)

    def check_config(self, config) -> None:
        super().check_config(config)
        tokens, window = config.mm_tokens_per_image, config.text_config.sliding_window
        if tokens > window:
            raise InputError(
                f"mm_tokens_per_image={tokens} exceeds sliding_window={window}: whether an image "
                f"sees itself whole in a local layer depends on the transformers version"
            )

    tiny_decoder = "gemma3_text"
    fits = Family.fits  # the processor puts markers around every image

    def image_tokens(self, image: Vision, config) -> int:
        return config.mm_tokens_per_image

    def image_text(self, image: Vision, config) -> list[int]:
        inside = [config.image_token_id] * config.mm_tokens_per_image
        return [config.boi_token_index, *inside, config.eoi_token_index]

    def two_way(self, config) -> bool:
        return True

    def blocks(self, config, prompt_ids: Tensor) -> list[tuple[int, int]]:
        return token_runs(prompt_ids, config.image_token_id)

    def stock_inputs(self, config, ids, vision, prompt=None) -> dict[str, Tensor]:
        types = (ids == config.image_token_id).long()
        return super().stock_inputs(config, ids, vision, prompt) | {"token_type_ids": types}

    def tiny_top(self, text, vision):
        return {"mm_tokens_per_image": 4, "boi_token_index": 103, "eoi_token_index": 104}

    tiny_image_text = "<start_of_image>"

    def tiny_tokens(self, config):
        return {
            "boi_token": (self.tiny_image_text, config.boi_token_index),
            "image_token": ("<image_soft_token>", config.image_token_id),
            "eoi_token": ("<end_of_image>", config.eoi_token_index),
        }

    def tiny_processor(self, config, tokenizer, **options):
        from transformers import Gemma3ImageProcessorPil, Gemma3Processor

        side = config.vision_config.image_size
        pictures = Gemma3ImageProcessorPil(size={"height": side, "width": side})
        return Gemma3Processor(
            pictures, tokenizer, image_seq_length=config.mm_tokens_per_image, **options
        )


FAMILIES = (Gemma3("gemma3"), Gemma3Text("gemma3_text"))
