# SPDX-License-Identifier: Apache-2.0
"""The engine: log-probs and GRPO steps of whole groups."""

from fastgrpo.engine.balance import RouterBalance
from fastgrpo.engine.score import GroupScores, score
from fastgrpo.engine.self_check import SelfCheckError
from fastgrpo.engine.step import GRPOStep
