"""Reward functions of the published systems, by name.

`get("vlm_r1/iou")` returns a function with TRL's signature; `names()` lists them; `stats()` tells
how many completions could not be scored and why.
"""

from fastgrpo.rewards import vlm_r1, vlm_r1_answers, vlm_r1_detection
from fastgrpo.rewards.registry import Reward, get, names, reset_stats, reward, stats

__all__ = ["Reward", "get", "names", "reset_stats", "reward", "stats"]
