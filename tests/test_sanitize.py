# SPDX-License-Identifier: Apache-2.0
"""The cases that compute-sanitizer runs on a GPU are valid calls: they run on the CPU."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "sanitize.py"))


@pytest.mark.parametrize("name", list(SCRIPT["CASES"]))
def test_sanitizer_case_runs(name, capsys):
    SCRIPT["run"]("cpu", [name])
    assert capsys.readouterr().out == f"{name}: ran\n"
