"""From rewards to advantages: aggregation, shaping, group rules, step rewards, schedules."""

from fastgrpo.advantages.columns import column_advantages
from fastgrpo.advantages.groups import (
    cross_vote_rewards,
    gate_advantages,
    keep_groups,
    majority_answer,
    majority_vote_rewards,
    paired_gate,
    trust_weighted_rewards,
)
from fastgrpo.advantages.perception import (
    quantile_mask,
    sequence_mean,
    top_share_mask,
    trajectory_weights,
    visual_dependency,
)
from fastgrpo.advantages.schedule import Schedule
from fastgrpo.advantages.shaping import (
    RunningShaper,
    centered,
    fitted_polynomial,
    log_sigmoid_centered,
    par,
    penalize_length,
    relative_arctan,
    relative_tanh,
)
from fastgrpo.advantages.steps import (
    agent_step_rewards,
    clip_step_rewards,
    delta_step_rewards,
    discounted_returns,
    episode_return,
    step_episode_advantages,
    trajectory_preference_loss,
)
