"""Rollouts in the training process."""

from fastgrpo.rollout.generate import generate
from fastgrpo.rollout.sampling import Sampling
