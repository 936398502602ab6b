# SPDX-License-Identifier: Apache-2.0
"""Figures of a checkpoint on rows with solutions: grounding, detection, choices, mathematics."""

from fastgrpo.evaluation.run import evaluate
from fastgrpo.evaluation.tasks import TASKS, task
