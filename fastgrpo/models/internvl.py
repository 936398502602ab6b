# SPDX-License-Identifier: Apache-2.0
"""InternVL 3 and 3.5: square tiles, each shuffled down to a fixed number of features."""

from fastgrpo.models.family import Coordinates
from fastgrpo.models.tiles import Tiles


class InternVL(Tiles):
    """An image is one to twelve tiles and a thumbnail."""

    coordinates = Coordinates(
        "thousandths",
        "OpenGVLab/InternVL internvl_chat/eval/refcoco/evaluate_grounding.py: divided by 1000, "
        "times width and height",
    )

    def image_tokens(self, image, config) -> int:
        return config.image_seq_length

    def tiny_tower(self, text):
        return super().tiny_tower(text) | {"image_size": [16, 16], "patch_size": [4, 4]}

    def tiny_top(self, text, vision):
        return {"image_seq_length": 4, "downsample_ratio": 0.5}

    tiny_image_text = "<IMG_CONTEXT>"

    def tiny_tokens(self, config):
        return {
            "context_image_token": (self.tiny_image_text, config.image_token_id),
            "start_image_token": ("<img>", None),
            "end_image_token": ("</img>", None),
            "video_token": ("<video>", None),
        }

    def tiny_processor(self, config, tokenizer, **options):
        """Without the video half, which needs torchvision."""
        from transformers import GotOcr2ImageProcessorPil, InternVLProcessor

        class InternVLImages(InternVLProcessor):
            def __init__(self, image_processor, tokenizer, **options):
                super().__init__(image_processor, tokenizer, **options)

        height, width = config.vision_config.image_size
        pictures = GotOcr2ImageProcessorPil(
            size={"height": height, "width": width}, crop_to_patches=True, max_patches=4
        )
        return InternVLImages(
            pictures, tokenizer, image_seq_length=config.image_seq_length, **options
        )


FAMILIES = (InternVL("internvl"),)
