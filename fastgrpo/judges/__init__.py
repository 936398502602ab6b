"""Models as rewards: a judge over HTTP, a model in this process, one trained beside the policy."""

from fastgrpo.judges.http import HTTPJudge, ResponseCache, score_between_0_and_1
from fastgrpo.judges.model import (
    CoTrainedReward,
    ModelReward,
    ScalarRewardModel,
    bradley_terry_loss,
    group_pairs,
)
