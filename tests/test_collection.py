# SPDX-License-Identifier: Apache-2.0
"""What `pytest -m gpu` needs: torch, triton, transformers and pytest, and nothing else of ours."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ABSENT = (
    "trl accelerate datasets peft deepspeed liger_kernel kernels pycocotools lap jiwer rouge_score "
    "scipy sklearn orjson msgspec re2 rapidfuzz math_verify latex2sympy2_extended json_repair PIL "
    "hypothesis matplotlib pyarrow httpx2 xdist pytest_timeout pytest_benchmark"
).split()
COLLECT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "."]))
"""


def test_gpu_tests_are_collected_without_further_packages():
    done = subprocess.run(
        [sys.executable, "-c", COLLECT],
        cwd=TESTS.parent,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for path in TESTS.glob("test_gpu_*.py"):
        assert f"{path.name}::" in done.stdout
    assert "test_trl" not in done.stdout


def test_gpu_tests_stand_in_files_of_that_name():
    mark = "mark." + "gpu"
    astray = [p.name for p in TESTS.glob("test_*.py") if mark in p.read_text()]
    assert astray and all(name.startswith("test_gpu_") for name in astray)
