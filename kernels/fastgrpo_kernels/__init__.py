# SPDX-License-Identifier: Apache-2.0
"""The kernels of fastgrpo: Triton, and the compiled C++ and CUDA parts where they were built."""

import json
from pathlib import Path

__version__ = "0.1.0"  # of both packages; pyproject.toml reads it here


def build_info() -> dict[str, dict]:
    """Per part, "cpp" and "cuda": {"built": bool, "reason": why not, or None}."""
    record = Path(__file__).with_name("_build_info.json")
    if record.exists():
        return json.loads(record.read_text())
    reason = "not built: install the package with pip"
    return {part: {"built": False, "reason": reason} for part in ("cpp", "cuda")}
