# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share, as far as a CPU can show it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("bench_common", ROOT / "bench" / "common.py")
    module = sys.modules["bench_common"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_common"]


def test_a_result_file_keeps_the_shapes_that_were_not_measured_again(common, tmp_path):
    def saved(*rows):
        path = common.save([common.Row(*row) for row in rows], directory=tmp_path)
        runs = json.loads(path.read_text())["runs"]
        assert all(run["op"] == row["op"] for run in runs for row in run["rows"])
        return sorted((r["op"], r["shape"], r["ms"]) for run in runs for r in run["rows"])

    saved(("a", "small", "ours", 1.0), ("a", "large", "ours", 2.0), ("b", "small", "ours", 3.0))
    assert saved(("a", "large", "ours", 4.0)) == [
        ("a", "large", 4.0),
        ("a", "small", 1.0),
        ("b", "small", 3.0),
    ]


@pytest.mark.parametrize("call_ms", [0.02, 3.0, 45.0])
def test_a_gpu_median_is_of_enough_calls(common, monkeypatch, call_ms):
    testing = pytest.importorskip("triton.testing")
    calls = []

    def do_bench(run, warmup=25, rep=100, return_mode="mean"):
        calls.append(max(1, int(rep / call_ms)))  # as Triton's own counts them
        return call_ms

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert common.median_ms({"one": lambda: None}, "cuda") == {"one": call_ms}
    assert calls[-1] >= 20 and calls[-1] * call_ms >= 99


def test_a_result_is_of_the_code_whatever_results_changed(common, monkeypatch, tmp_path):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    files = tmp_path / "code.py", results / "old.json"
    for path in files:
        path.write_text("first")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    for args in (("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", tmp_path, *args], check=True)
    monkeypatch.setattr(common, "RESULTS", results)
    found = []
    for path in files[::-1]:
        path.write_text("second")
        found.append(common.environment()["modified"])
    assert found == [False, True]
