# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of matching and average precision against the CPU's results."""

import numpy as np
import pytest
import torch

import fastgrpo as fg
from fastgrpo.reference.match_boxes import METHODS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_match_boxes_cuda_equals_the_cpu(method, dtype):
    rng = np.random.default_rng(0)
    a_sizes = [*rng.integers(0, 60, 200).tolist(), 256, 256, 1, 0]
    b_sizes = [*rng.integers(0, 60, 200).tolist(), 256, 100, 256, 3]
    counts = [n * m for n, m in zip(a_sizes, b_sizes, strict=True)]
    scores = torch.tensor(rng.random(sum(counts)), dtype=dtype)
    mask = torch.tensor(rng.random(sum(counts)) < 0.8)
    offsets = np.cumsum([0, *counts])
    for options in ({}, {"threshold": 0.4, "mask": mask}):
        want = fg.match_boxes(scores, offsets, a_sizes, b_sizes, method=method, **options)
        options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        got = fg.match_boxes(
            scores.cuda(), offsets, a_sizes, b_sizes, method=method, impl="cuda", **options
        )
        assert got.device.type == "cuda"
        for block, ours, theirs in zip(
            scores.split(counts), got.cpu().split(a_sizes), want.split(a_sizes), strict=True
        ):
            if method == "optimal":
                assert (ours >= 0).sum() == (theirs >= 0).sum()
                assert matched(block, ours) == pytest.approx(matched(block, theirs))
            else:
                assert torch.equal(ours, theirs)


def matched(scores: torch.Tensor, columns: torch.Tensor) -> float:
    """The sum of the matched scores of one problem."""
    rows = (columns >= 0).nonzero()[:, 0]
    if not len(rows):
        return 0.0
    return float(scores.double().view(len(columns), -1)[rows, columns[rows]].sum())


def test_average_precision_cuda_equals_the_cpu():
    rng = np.random.default_rng(3)
    sizes = rng.integers(0, 150, 60).tolist(), [12] * 60
    labels = [torch.tensor(rng.integers(1, 5, sum(n))) for n in sizes]
    boxes = []
    for n in sizes:
        corner = rng.integers(0, 25, (sum(n), 2))
        boxes.append(np.concatenate([corner, corner + rng.integers(1, 15, (sum(n), 2))], 1))
    predicted, truth = (torch.tensor(b, dtype=torch.float64) for b in boxes)
    scores = torch.tensor(rng.integers(0, 4, sum(sizes[0])) / 4.0)  # many ties
    tensors = (predicted, labels[0], scores, truth, labels[1])
    for options in ({}, {"area_range": (16.0, 90.0)}):
        want = fg.average_precision(*tensors, *sizes, per_threshold=True, **options)
        got = fg.average_precision(
            *(t.cuda() for t in tensors), *sizes, per_threshold=True, impl="cuda", **options
        )
        assert want.any()
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-12)
