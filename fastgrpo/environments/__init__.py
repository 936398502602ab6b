# SPDX-License-Identifier: Apache-2.0
"""Environments of the systems that answer over several turns, as TRL's `environment_factory`.

`get("vrag_rl")` makes a factory; every module of this folder that names an `ENVIRONMENT` is found.
The model calls an environment's public methods as tools; what they return is masked from the loss
by TRL. The system's reward reads the environment of its rollout (column `environments`).
"""

from fastgrpo.errors import require

require("fastgrpo.environments", "rewards", "PIL")

from fastgrpo.environments.environment import Environment, Step, ToolFault
from fastgrpo.environments.registry import get, names
