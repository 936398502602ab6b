# SPDX-License-Identifier: Apache-2.0
"""Reward functions of the published systems, by name.

`get("vlm_r1/iou")` returns a function with TRL's signature; `names()` lists them; `stats()` tells
how many completions could not be scored and why.
"""

from fastgrpo.errors import require

require(
    *("fastgrpo.rewards", "rewards", "PIL", "json_repair", "math_verify", "msgspec", "orjson"),
    *("rapidfuzz", "re2", "scipy"),
)

from fastgrpo.rewards import systems
from fastgrpo.rewards.core.registry import Reward, get, names, published, reset_stats, reward, stats
from fastgrpo.rewards.read.math_pool import configure as configure_math

__all__ = [
    "Reward", "configure_math", "get", "names", "published", "reset_stats", "reward", "stats",
]  # fmt: skip
