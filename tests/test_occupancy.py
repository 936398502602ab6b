# SPDX-License-Identifier: Apache-2.0
"""The model of occupancy that the attention kernels' tiles are chosen by, and the kept lines."""

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = str(Path(__file__).resolve().parent.parent / "bench")
sys.path.append(BENCH)
import occupancy  # noqa: E402

sys.path.remove(BENCH)

from fastgrpo_kernels.shared_prefix_schedule import Tiles, compiled_tiles  # noqa: E402


@pytest.fixture(scope="module")
def lines():
    return occupancy.read(occupancy.LINES)


def test_kept_lines_are_what_the_model_predicts(lines):
    assert {(line.kernel, line.shape) for line in lines} == {
        (kernel, shape) for kernel in occupancy.CANDIDATES for shape in occupancy.SHAPES
    }
    for line in lines:
        if line.shape != "7B P=3000 G=16 C=1024":  # the slowest to schedule
            t = Tiles(*line.tiles)
            now = occupancy.predict(line.kernel, t, line.shape, line.registers, line.shared)
            assert now == dataclasses.replace(line, measured_ms=None)


def test_the_best_tiles_of_the_kept_lines_are_launched(lines):
    for kernel, t in occupancy.best(lines).items():
        assert t == compiled_tiles(kernel, occupancy.ARCH, False, occupancy.D, True), kernel


def test_no_gradient_of_keys_waits_for_the_longest_program(lines):
    launched = compiled_tiles("dkv", occupancy.ARCH, False, occupancy.D, True)
    mine = [x for x in lines if x.kernel == "dkv" and Tiles(*x.tiles) == launched]
    assert len(mine) == len(occupancy.SHAPES)
    for line in mine:
        assert line.predicted_ms <= 1.2 * line.busy_ms, line


def test_a_measured_line_is_chosen_by_its_measurement(lines):
    best = occupancy.best(lines)["dq"]
    slow = [
        dataclasses.replace(x, measured_ms=9.0)
        if x.kernel == "dq" and Tiles(*x.tiles) == best
        else x
        for x in lines
    ]
    assert occupancy.best(slow)["dq"] != best


def test_makespan_of_programs_in_launch_order():
    assert occupancy.makespan([3.0, 2.0, 2.0, 1.0], 2) == 4.0  # (3, 1) and (2, 2)
    assert occupancy.makespan([1.0, 1.0, 5.0], 2) == 6.0


def test_programs_count_the_iterations_of_the_kernels():
    shape = "3B P=1000 G=8 C=256"
    P, G, C, H, K = occupancy.SHAPES[shape]
    counts, parts = occupancy.programs("fwd", Tiles(128, 64, 8, 3), shape)
    by_rows = sum(-(-min(row + 128, P) // 64) for row in range(0, P, 128))
    by_rows += G * sum(-(-(P + row + 128) // 64) for row in range(0, C, 128))
    assert sum(counts) == H * by_rows and not any(parts)
    counts, parts = occupancy.programs("dkv", Tiles(128, 128, 8, 1), shape)
    rows = sum(-(-(P + G * C - key) // 128) for key in range(0, P, 128))
    rows += G * sum(-(-(C - key) // 128) for key in range(0, C, 128))
    assert abs(sum(counts) - H * rows) <= len(counts) and any(parts)  # a cut within a tile of rows
