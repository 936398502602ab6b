"""Reward functions of the published systems, by name.

`get("vlm_r1/iou")` returns a function with TRL's signature; `names()` lists them; `stats()` tells
how many completions could not be scored and why.
"""

from fastgrpo.rewards import (
    affordance_r1,
    curr_reft,
    judge_models,
    magicgui,
    perception_r1,
    q_insight,
    readings,
    rewardmap,
    sophiavl_r1,
    spatialladder,
    three_d_r1,
    v_triune,
    vicrit,
    vision_r1,
    vision_sr1,
    visual_rft,
    vlm_r1,
    vlm_r1_answers,
    vlm_r1_detection,
    vrag_rl,
)
from fastgrpo.rewards.math_pool import configure as configure_math
from fastgrpo.rewards.registry import Reward, get, names, reset_stats, reward, stats

__all__ = ["Reward", "configure_math", "get", "names", "reset_stats", "reward", "stats"]
