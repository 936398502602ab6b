# SPDX-License-Identifier: Apache-2.0
"""From rewards to advantages: aggregation, group rules, perception, turns."""

from fastgrpo.advantages.columns import column_advantages
from fastgrpo.advantages.groups import keep_groups, paired_gate
from fastgrpo.advantages.perception import (
    quantile_mask,
    sequence_mean,
    top_share_mask,
    trajectory_weights,
    visual_dependency,
)
from fastgrpo.advantages.steps import step_episode_advantages
