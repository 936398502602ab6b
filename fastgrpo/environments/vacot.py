# SPDX-License-Identifier: Apache-2.0
"""VACoT's environment, by its abstract: changes of the image that make it easier to read."""

from __future__ import annotations

from PIL import Image, ImageFilter, ImageOps

from fastgrpo.environments.environment import Environment, ToolFault, tool

TURNS = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180,
         270: Image.Transpose.ROTATE_90}  # fmt: skip


class VACoT(Environment):
    """`zoom`, `rotate`, `denoise` and `contrast`; which changes there are is our own reading."""

    @tool
    def rotate(self, degrees: int, image: int) -> list:
        """
        Turns an image clockwise.

        Args:
            degrees: 90, 180 or 270.
            image: Which image, counted from 1 in the order they were shown.

        Returns:
            The turned image.
        """
        if degrees not in TURNS:
            raise ToolFault(f"degrees: expected 90, 180 or 270, got {degrees!r}")
        turned = self._image(image).transpose(TURNS[degrees])
        return self._see(turned, f"Image {image}, turned by {degrees} degrees."), degrees

    @tool
    def denoise(self, image: int) -> list:
        """
        Takes noise out of an image.

        Args:
            image: Which image, counted from 1 in the order they were shown.

        Returns:
            The image without noise.
        """
        clean = self._image(image).filter(ImageFilter.MedianFilter(3))
        return self._see(clean, f"Image {image} without noise."), None

    @tool
    def contrast(self, image: int) -> list:
        """
        Stretches the brightness of an image over the whole range.

        Args:
            image: Which image, counted from 1 in the order they were shown.

        Returns:
            The image with more contrast.
        """
        stretched = ImageOps.autocontrast(self._image(image))
        return self._see(stretched, f"Image {image} with more contrast."), None


ENVIRONMENT = VACoT
