# SPDX-License-Identifier: Apache-2.0
"""Images wherever they come from: one reader, one size, and the perturbations that keep it."""

from fastgrpo.errors import require

require("fastgrpo.images", "rewards", "PIL")

from fastgrpo.images.read import MAX_PIXELS, ImageFault, image_size, load_image
