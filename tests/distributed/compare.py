# SPDX-License-Identifier: Apache-2.0
"""What tests of distributed runs share: which modes can run, and what equal means."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

TOLERANCE = 1e-5  # of parameters, relative, float32
METRICS = ("loss", "grad_norm", "reward", "entropy", "kl", "eval_loss", "eval_reward", "eval_kl")


def needs(mode: str) -> None:
    """Skips a test whose mode is not installed."""
    if mode.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")


def assert_same_steps(
    got: Path, expected: Path, what: str, metrics: tuple[str, ...] = METRICS
) -> None:
    """The logged steps of two runs, in `metrics` that the expected one has."""
    got, expected = (json.loads(path.read_text()) for path in (got, expected))
    assert len(got) == len(expected) > 0, what
    for ours, theirs in zip(got, expected, strict=True):
        for metric in metrics:
            if metric in theirs:
                want = pytest.approx(theirs[metric], rel=1e-4, abs=1e-5)
                assert ours[metric] == want, (what, metric)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest |a - b| over the tensors, relative to the largest |b| of its tensor."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max((float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-3)), n) for n in b)
