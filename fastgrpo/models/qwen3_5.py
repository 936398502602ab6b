# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5, 3.6 and 3.8 (one structure): gated DeltaNet in three of four layers, images or text."""

from __future__ import annotations

from torch import nn

from fastgrpo.models.family import Coordinates, Family, Vision
from fastgrpo.models.qwen2_vl import QwenVL
from fastgrpo.models.qwen3_vl import frame_runs


class GatedDeltaNet(Family):
    """Layers of linear attention beside full attention; the mixers have a decay A_log."""

    layer_kinds = ("full_attention", "sliding_attention", "linear_attention")

    def mixers(self, core: nn.Module) -> list[nn.Module]:
        return [m for m in core.modules() if hasattr(m, "A_log") and hasattr(m, "conv1d")]

    def tiny_mixers(self, text: dict) -> dict:
        """The fields of a small hybrid, those given on top."""
        layers = text["num_hidden_layers"]
        kinds = ["full_attention" if i % 2 else "linear_attention" for i in range(layers)]
        rope = {"partial_rotary_factor": 0.5} | text["rope_parameters"]
        linear = dict(
            head_dim=16,
            layer_types=kinds,
            linear_conv_kernel_dim=4,
            linear_key_head_dim=8,
            linear_value_head_dim=12,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        )
        return linear | text | {"rope_parameters": rope}

    def tiny_config(self, text: dict, vision: dict, ids: dict[str, int], **top):
        return super().tiny_config(self.tiny_mixers(text), vision, ids, **top)


class Qwen35(GatedDeltaNet, QwenVL):
    """As Qwen3-VL without deepstack; a quarter of each head is rotated."""

    def video_runs(self, video: Vision, config) -> list[int]:
        return frame_runs(video, config)

    coordinates = Coordinates(
        "thousandths",
        "QwenLM/Qwen3.8-Flash-Next#4, by its authors: still relative to [0, 1000]",
    )

    def tiny_parts(self, text, vision):
        text, vision = super().tiny_parts(text, vision)
        rope = {"mrope_interleaved": True} | text["rope_parameters"]
        tower = dict(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=text["hidden_size"],
            num_position_embeddings=64,
        )
        return text | {"rope_parameters": rope}, tower | vision


FAMILIES = (Qwen35("qwen3_5"), GatedDeltaNet("qwen3_5_text"))
