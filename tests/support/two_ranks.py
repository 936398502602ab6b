# SPDX-License-Identifier: Apache-2.0
"""A test file as a script, in two processes."""

import os
import subprocess
import sys
from pathlib import Path


def run_two_ranks(file: str, *arguments: object) -> None:
    """`python FILE ARGUMENTS RANK` for ranks 0 and 1, which import what tests do; both must end
    well, and neither is left behind."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, file, *map(str, arguments)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=env)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
