# SPDX-License-Identifier: Apache-2.0
"""ARM-Thinker's environment (InternLM/ARM-Thinker@96b1baf): a judge that may look closer."""

from __future__ import annotations

from fastgrpo.environments.environment import Environment


class ArmThinker(Environment):
    """A zoom into the images that the two answers are about; `arm_thinker/episode` reads it."""


ENVIRONMENT = ArmThinker
