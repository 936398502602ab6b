# SPDX-License-Identifier: Apache-2.0
"""A drop-in for TRL's GRPOTrainer, tested with trl 1.16."""

from fastgrpo.errors import require

require("fastgrpo.integrations.trl", "trl", "trl", "accelerate", "datasets")

from fastgrpo.integrations.trl.version import check_not_older

check_not_older()

from fastgrpo.integrations.trl.guard import RewardGuard
from fastgrpo.integrations.trl.recorder import record
from fastgrpo.integrations.trl.trainer import FastGRPOTrainer, FastOptions, accelerate
