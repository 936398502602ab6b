# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share, as far as a CPU can show it."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("call_ms", [0.02, 3.0, 45.0])
def test_a_gpu_median_is_of_enough_calls(monkeypatch, call_ms):
    testing = pytest.importorskip("triton.testing")
    path = ROOT / "bench" / "common.py"
    spec = importlib.util.spec_from_file_location("bench_common", path)
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    calls = []

    def do_bench(run, warmup=25, rep=100, return_mode="mean"):
        calls.append(max(1, int(rep / call_ms)))  # as Triton's own counts them
        return call_ms

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert common.median_ms({"one": lambda: None}, "cuda") == {"one": call_ms}
    assert calls[-1] >= 20 and calls[-1] * call_ms >= 99
