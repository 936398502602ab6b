# SPDX-License-Identifier: Apache-2.0
"""Models as rewards: over HTTP, in this process, trained beside the policy, as likelihoods."""

from fastgrpo.errors import require

require("fastgrpo.judges", "rewards", "orjson", "re2")

from fastgrpo.judges.bound import Bound
from fastgrpo.judges.http import HTTPJudge, ResponseCache, score_between_0_and_1
from fastgrpo.judges.likelihood import (
    ChoiceProbability,
    FollowUpLikelihood,
    choice_probability,
    continuation_logp,
)
from fastgrpo.judges.model import (
    CoTrainedReward,
    ImplicitProcessReward,
    ModelReward,
    bradley_terry_loss,
    group_pairs,
    trajectory_preference_loss,
)
from fastgrpo.judges.second_pass import SecondPass
