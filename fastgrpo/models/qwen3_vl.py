# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: features enter at the decoder's input and, as deepstack, at its first layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.models.family import Coordinates, Features, Join, Vision
from fastgrpo.models.qwen2_vl import QwenVL


def frame_runs(video: Vision, config) -> list[int]:
    """A video's frames, each a run of placeholders after its time in words."""
    frames, height, width = video["video_grid_thw"][0].tolist()
    return [height * width // config.vision_config.spatial_merge_size**2] * frames


class Qwen3VL(QwenVL):
    """As Qwen2-VL, with features for several layers of the decoder and interleaved M-RoPE."""

    coordinates = Coordinates(
        "thousandths", "QwenLM/Qwen3-VL#1427, by its authors: relative coordinates, 0-1000"
    )

    def video_runs(self, video: Vision, config) -> list[int]:
        return frame_runs(video, config)

    def split_features(self, output, images: Sequence[Vision]) -> tuple[list[Features], Join]:
        kind, pooled, deep = type(output), output.pooler_output, output.deepstack_features
        # transformers 5.17 gives deepstack as one tensor per layer, 5.23 as one per image
        whole = any(isinstance(layer, Tensor) for layer in deep)
        sizes = [len(feature) for feature in pooled]
        layers = [layer.split(sizes) if whole else layer for layer in deep]

        def join(features: Sequence[Features]):
            pooled, *layers = zip(*features, strict=True)
            deep = [torch.cat(layer) if whole else layer for layer in layers]
            return kind(pooler_output=pooled, deepstack_features=deep)

        return [list(features) for features in zip(pooled, *layers, strict=True)], join

    def tiny_parts(self, text, vision):
        text, vision = super().tiny_parts(text, vision)
        rope = {"mrope_interleaved": True} | text["rope_parameters"]
        tower = dict(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=text["hidden_size"],
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 2],
        )
        return text | {"rope_parameters": rope}, tower | vision


FAMILIES = (Qwen3VL("qwen3_vl"),)
