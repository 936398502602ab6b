# SPDX-License-Identifier: Apache-2.0
"""Triton kernels run on their tensors' device, not on the current one."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastgrpo_kernels import launch as module
from fastgrpo_kernels.launch import launch


class Recorder:
    """A kernel that notes the grid, its arguments and the current device of each launch."""

    def __init__(self, device):
        self.device, self.launches = device, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options, self.device[0]))


class OnSecondGPU:
    is_cuda = True

    def get_device(self):
        return 1


@pytest.fixture
def current(monkeypatch):
    """The current device of a machine with two GPUs, in a list; 0 at first."""
    device = [0]

    def exchange(index):
        before, device[0] = device[0], index if index >= 0 else device[0]
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return device


def test_launch_runs_on_the_tensors_device_and_gives_the_current_one_back(current):
    kernel = Recorder(current)
    launch(kernel, (3, 2), OnSecondGPU(), 7, BLOCK=16)
    assert kernel.launches == [((3, 2), (7,), {"BLOCK": 16}, 1)]
    assert current == [0]


def test_launch_leaves_the_device_alone_for_cpu_tensors(current):
    kernel = Recorder(current)
    launch(kernel, (1,), torch.zeros(1), 7)
    assert kernel.launches == [((1,), (7,), {}, 0)]


@pytest.mark.parametrize("grid", [(0,), (5, 0)])
def test_launch_of_an_empty_grid_does_nothing(current, grid):
    kernel = Recorder(current)
    launch(kernel, grid, OnSecondGPU(), 7)
    assert kernel.launches == [] and current == [0]


def test_kernels_are_launched_by_nothing_else():
    for path in Path(module.__file__).parent.glob("*.py"):
        assert path.stem == "launch" or not re.findall(r"kernel\[\(?\w", path.read_text()), path
