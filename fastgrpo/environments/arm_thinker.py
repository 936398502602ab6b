# SPDX-License-Identifier: Apache-2.0
"""ARM-Thinker's environment (InternLM/ARM-Thinker@96b1baf): a judge that may look closer."""

from __future__ import annotations

from fastgrpo.environments.environment import Environment, tool


class ArmThinker(Environment):
    """A zoom into the images that the two answers are about; `arm_thinker/episode` reads it."""

    @tool
    def zoom(self, box: list[float], image: int) -> list:
        """
        Looks closer at a part of an image.

        Args:
            box: The part, as [x1, y1, x2, y2] in thousandths of the image's width and height.
            image: Which image, counted from 1 in the order they were shown.

        Returns:
            The part, enlarged.
        """
        return self._see(self._cut(box, image), f"The part {box} of image {image}."), box


ENVIRONMENT = ArmThinker
