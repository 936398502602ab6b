# SPDX-License-Identifier: Apache-2.0
"""Reward functions of the published systems, by name.

`get("vlm_r1/iou")` returns a function with TRL's signature; `names()` lists them; `stats()` tells
how many completions could not be scored and why.
"""

from fastgrpo.rewards import systems
from fastgrpo.rewards.core.registry import Reward, get, names, published, reset_stats, reward, stats
from fastgrpo.rewards.read.math_pool import configure as configure_math

__all__ = [
    "Reward", "configure_math", "get", "names", "published", "reset_stats", "reward", "stats",
]  # fmt: skip
