# SPDX-License-Identifier: Apache-2.0
"""Rollouts in the training process."""

from fastgrpo.rollout.generate import generate
from fastgrpo.rollout.sampling import Sampling
