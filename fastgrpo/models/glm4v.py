# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V and 4.6V: Qwen's patches and three axes, another tower and decoder."""

from __future__ import annotations

from fastgrpo.models.family import Coordinates, Vision
from fastgrpo.models.qwen2_vl import QwenVL


class Glm4V(QwenVL):
    """As Qwen2-VL; the markers around an image have names of their own. No videos: their frames are
    image placeholders, told apart by markers around them."""

    video_inputs = ()

    coordinates = Coordinates(
        "thousandths",
        "zai-org/GLM-skills, skill glmv-grounding: normalised to 0-1000 by width and height",
    )

    def image_text(self, image: Vision, config) -> list[int]:
        inside = [config.image_token_id] * self.image_tokens(image, config)
        return [config.image_start_token_id, *inside, config.image_end_token_id]

    def tiny_config(self, text, vision, ids, **top):
        markers = {
            "image_start_token_id": ids["vision_start"],
            "image_end_token_id": ids["vision_end"],
        }
        return super().tiny_config(text, vision, ids, **(markers | top))

    def tiny_parts(self, text, vision):
        text, vision = super().tiny_parts(text, vision)
        tower = dict(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=text["hidden_size"],
            image_size=64,
            num_position_embeddings=64,
        )
        rope = {"partial_rotary_factor": 0.5} | text["rope_parameters"]
        return text | {"head_dim": 16, "pad_token_id": 0, "rope_parameters": rope}, tower | vision

    def tiny_tokens(self, config):
        return super().tiny_tokens(config) | {
            "vision_start_token": ("<|vision_start|>", config.image_start_token_id),
            "vision_end_token": ("<|vision_end|>", config.image_end_token_id),
        }


FAMILIES = (Glm4V("glm4v"), Glm4V("glm46v"))
