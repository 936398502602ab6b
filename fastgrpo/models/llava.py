# SPDX-License-Identifier: Apache-2.0
"""LLaVA 1.5: one picture, one feature a patch of a CLIP or SigLIP tower."""

from __future__ import annotations

from fastgrpo.errors import InputError
from fastgrpo.models.tiles import Tiles


class Llava(Tiles):
    """Which of the tower's layers, and whether its class token, become features is configured."""

    tiny_decoder = "llama"
    # Its boxes are shares of the picture padded to a square (haotian-liu/LLaVA#606), which the
    # processor of transformers crops instead.
    coordinates = None

    def image_tokens(self, image, config) -> int:
        tower = config.vision_config
        if tower.model_type == "pixtral":
            raise InputError("LLaVA on a Pixtral tower is not served; Mistral3 is")
        tokens = (tower.image_size // tower.patch_size) ** 2
        return tokens + (config.vision_feature_select_strategy == "full") * self.has_class_token(
            tower
        )

    def has_class_token(self, tower) -> bool:
        return tower.model_type == "clip_vision_model"

    def tiny_tower(self, text):
        return super().tiny_tower(text) | {"model_type": "clip_vision_model"}

    def tiny_top(self, text, vision):
        return {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}

    def tiny_processor(self, config, tokenizer, **options):
        import transformers

        tower = config.vision_config
        kind = {"llava": "Llava", "llava_next": "LlavaNext"}[self.name]
        side = {"height": tower.image_size, "width": tower.image_size}
        pictures = getattr(transformers, f"{kind}ImageProcessorPil")(
            size={"shortest_edge": tower.image_size}, crop_size=side, **self.tiny_pictures(config)
        )
        return getattr(transformers, f"{kind}Processor")(
            pictures,
            tokenizer,
            patch_size=tower.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
            **options,
        )

    def tiny_pictures(self, config) -> dict:
        """This family's options of the image processor."""
        return {}


FAMILIES = (Llava("llava"),)
