# SPDX-License-Identifier: Apache-2.0
"""InternVL 3 and 3.5: square tiles, each shuffled down to a fixed number of features."""

from fastgrpo.models.family import Coordinates
from fastgrpo.models.tiles import Tiles


class InternVL(Tiles):
    """An image is one to twelve tiles and a thumbnail."""

    coordinates = Coordinates(
        "thousandths",
        "InternVL documentation, Grounding data: normalised to 0-1000, [[x1,y1,x2,y2]]",
    )

    def image_tokens(self, image, config) -> int:
        return config.image_seq_length

    def tiny_tower(self, text):
        return super().tiny_tower(text) | {"image_size": [16, 16], "patch_size": [4, 4]}

    def tiny_top(self, text, vision):
        return {"image_seq_length": 4, "downsample_ratio": 0.5}


FAMILIES = (InternVL("internvl"),)
