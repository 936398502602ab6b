# SPDX-License-Identifier: Apache-2.0
"""Datasets of vision-language tasks in the columns TRL's trainers take."""

from fastgrpo.errors import require

require("fastgrpo.data", "trl", "PIL", "datasets", "orjson")

from fastgrpo.data.quarantine import Quarantine, SetAside
from fastgrpo.data.table import load_table
from fastgrpo.data.vlm_r1 import load_vlm_r1, split_validation
