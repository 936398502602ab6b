# SPDX-License-Identifier: Apache-2.0
"""bench/gpu.sh on the CPU: every stage runs, and what it leaves behind is read."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import goals  # noqa: E402

sys.path.remove(str(ROOT / "bench"))


def dry_run(out, *stages, python=sys.executable):
    command = ["bench/gpu.sh", "--device", "cpu", "--small", "--out", str(out), *stages]
    env = os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def stages_of(out):
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


def test_gpu_script_keeps_figures_with_hardware_and_versions(tmp_path):
    done = dry_run(tmp_path, "roofs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(s["stage"], s["status"]) for s in stages_of(tmp_path)] == [("roofs", 0)]
    (path,) = tmp_path.glob("*_*.json")
    (run,) = json.loads(path.read_text())["runs"]
    assert run["op"] == "roofs" and run["environment"]["versions"]["torch"]
    assert "| goal | bound | predicted | measured |" in (tmp_path / "goals.md").read_text()


@pytest.fixture
def stub(tmp_path):
    """A Python that runs nothing but the table, and fails at matching."""
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *goals.py*) exec {sys.executable} "$@" ;; *match_boxes*) exit 3 ;; esac\n'
    )
    path.chmod(0o755)
    return path


def test_gpu_script_goes_on_after_a_failure_and_fails_at_the_end(tmp_path, stub):
    out = tmp_path / "out"
    done = dry_run(out, "match_boxes", "correctness", python=stub)
    assert done.returncode == 1
    assert [(s["stage"], s["status"]) for s in stages_of(out)] == [
        ("match_boxes", 3),
        ("doctor", 0),
        ("tests", 0),
        ("sanitize", 0),
    ]
    assert "| GPU tests, exit status | <= 0 |  |  |" in (out / "goals.md").read_text()


def test_a_dry_run_meets_no_goal(tmp_path):
    lines = [{"stage": "tests", "device": d, "status": s} for d, s in (("cuda", 1), ("cpu", 0))]
    (tmp_path / "stages.jsonl").write_text("\n".join(map(json.dumps, lines)))
    row = {"op": "step", "shape": "small", "variant": "TRL"}
    for cuda in (None, "13.0"):
        runs = [{"environment": {"cuda": cuda}, "rows": [row | {"ms": 1.0}]}]
        (tmp_path / "figures.json").write_text(json.dumps({"runs": runs}))
        found = goals.figures_of(tmp_path)
        assert found.pop(("stage", "tests", "")) == lines[0]
        assert len(found) == bool(cuda)


def test_gpu_script_runs_everything_by_default(tmp_path, stub):
    out = tmp_path / "out"
    dry_run(out, python=stub)
    text = (ROOT / "bench" / "gpu.sh").read_text()
    names = [
        name
        for line in text.splitlines()
        if line.startswith(("correctness=", "figures="))
        for name in line.split('"')[1].split()
    ]
    ran = [s["stage"] for s in stages_of(out)]
    assert len(ran) == len(names) >= 15 and {"tests", "linear_grpo", "tiles"} <= set(ran)


def test_gpu_script_says_which_stages_there_are(tmp_path, stub):
    done = dry_run(tmp_path / "out", "nonsense", python=stub)
    assert done.returncode == 2 and "no stage nonsense; there are doctor" in done.stderr


@pytest.mark.slow
def test_gpu_script_dry_run(tmp_path):
    done = dry_run(tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert len(stages_of(tmp_path)) >= 15


def test_goals_are_measured_met_or_missed():
    head = ("linear_grpo", goals.HEAD_3B)
    figures = {
        (*head, "fastgrpo"): {"ms": 45.0, "peak_mib": 4000.0},
        (*head, "bare matmuls"): {"ms": 39.0},
        ("shared_prefix_attention", "7B P=1000 G=8 C=256", "triton"): {"ms": 0.5},
        ("shared_prefix_attention", "7B P=1000 G=8 C=256", "torch_varlen"): {"ms": 0.4},
        ("stage", "tests", ""): {"status": 0},
    }
    text = goals.table(figures)
    for line in (
        "| loss / three bare GEMMs, 3B head | <= 1.12 | 1.13 (H200), 1.18 (H100) | 1.15, missed |",
        "| loss, 3B head | <= 48 ms | 44 to 46 ms | 45 ms, met |",
        "| GPU tests, exit status | <= 0 |  | 0, met |",
        "| loss, 7B head | <= 84 ms |  |  |",
    ):
        assert line in text
    assert "P=1000 G=8 C=256 | <= 1 | 0.8 | 1.25, missed |" in text


def test_goals_name_figures_that_the_benchmarks_give():
    def constants(name, table):
        tree = ast.parse((ROOT / "bench" / f"bench_{name}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == table:
                return {key.value for key in node.value.keys}

    assert {goals.HEAD_3B, goals.HEAD_7B} <= constants("linear_grpo", "CUDA_SHAPES")
    shapes = constants("shared_prefix_attention", "CUDA_SHAPES")
    assert {"7B P=1000 G=8 C=256", "7B P=3000 G=16 C=1024"} <= shapes


def test_the_document_holds_the_table():
    text = (ROOT / "docs" / "gpu.md").read_text()
    rows = text.split(goals.START)[1].split(goals.END)[0].strip().splitlines()
    assert [row.rsplit("|", 2)[0] for row in rows[2:]] == [
        row.rsplit("|", 2)[0] for row in goals.table({}).splitlines()[2:]
    ]
