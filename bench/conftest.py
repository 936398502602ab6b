# SPDX-License-Identifier: Apache-2.0
"""`pytest bench/bench_<op>.py` runs the pytest-benchmark entry points: let them import `common`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
