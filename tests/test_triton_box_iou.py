# SPDX-License-Identifier: Apache-2.0
"""The Triton overlap kernels against the float64 reference, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels.box_iou import pairwise_box_iou

from fastgrpo.reference.box_iou import CONVENTIONS, KINDS
from fastgrpo.reference.box_iou import pairwise_box_iou as reference
from fastgrpo.testing import assert_within_budget

pytestmark = pytest.mark.interpreter


def boxes(n, seed=0, scale=40.0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * scale
    return torch.cat([corner, corner + torch.rand(n, 2, generator=g) * scale], 1)


def run(f, a, b, sizes, dtype, weight, **options):
    a, b = (x.to(dtype).clone().requires_grad_() for x in (a, b))
    values = f(a, b, *sizes, **options)
    (values * weight.to(dtype)).sum().backward()
    return values.detach(), a.grad, b.grad


def check(a, b, sizes, factor=2.0, **options):
    total = sum(n * m for n, m in zip(*sizes, strict=True))
    weight = torch.randn(total, generator=torch.Generator().manual_seed(9))
    ours = run(pairwise_box_iou, a, b, sizes, torch.float32, weight, **options)
    want = run(reference, a, b, sizes, torch.float64, weight, **options)
    same = run(reference, a, b, sizes, torch.float32, weight, **options)
    for what, o, w, s in zip(("value", "da", "db"), ours, want, same, strict=True):
        assert_within_budget(o, w, s, factor=factor, what=what)
    return ours[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_pairwise_box_iou_kinds_and_conventions(kind, convention):
    # more than one tile each way, samples without a's, without b's, with one pair
    sizes = ([37, 0, 1, 5], [41, 3, 1, 0])
    a, b = boxes(43), boxes(45, seed=1)
    a[3], b[7] = b[2], a[5]  # equal boxes: every min and max a tie
    check(a, b, sizes, kind=kind, convention=convention)


@pytest.mark.parametrize("kind", KINDS)
def test_pairwise_box_iou_small_samples(kind):
    sizes = ([1, 2, 8], [3, 1, 7])
    check(boxes(11), boxes(11, seed=3), sizes, kind=kind, convention="continuous")


@pytest.mark.parametrize("kind", KINDS)
def test_pairwise_box_iou_hostile_boxes(kind):
    inf, nan = torch.inf, torch.nan
    a = torch.tensor(
        [
            [0, 0, 2, 2],
            [2, 2, 0, 0],
            [0, 0, 1, -1],
            [nan, 0, 1, 1],
            [0, 0, inf, 1],
            [0, 0, 1e38, 1],
            [1, 1, 1, 1],
            [0, 0, 3, 0],
            [-4e18, 0, 4e18, 1],
            [5, 5, 6, 7],
        ]
    )
    for convention in CONVENTIONS:
        value = check(a, a.flip(0), ([10], [10]), kind=kind, convention=convention)
        assert bool(value.isfinite().all())


def test_pairwise_box_iou_of_equal_boxes_is_exactly_one():
    a = boxes(64)
    for kind in KINDS:
        value = pairwise_box_iou(a, a, [64], [64], kind=kind, convention="continuous")
        assert bool((value.view(64, 64).diagonal() == 1).all())


def test_pairwise_box_iou_equals_pytorch_bitwise():
    a, b = boxes(20), boxes(30, seed=2)
    ours = pairwise_box_iou(a, b, [20], [30], kind="iou", convention="continuous")
    assert torch.equal(ours, reference(a, b, [20], [30], kind="iou", convention="continuous"))


@pytest.mark.parametrize("kind", KINDS)
def test_pairwise_box_iou_float64(kind):
    a, b = boxes(9).double(), boxes(12, seed=1).double()
    a[0, 2] = a[0, 0]  # no width: an angle of 0
    options = {"kind": kind, "convention": "continuous"}
    ours = run(pairwise_box_iou, a, b, ([9], [12]), torch.float64, torch.ones(108), **options)
    want = run(reference, a, b, ([9], [12]), torch.float64, torch.ones(108), **options)
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-14)


def test_pairwise_box_iou_strided_inputs_and_gradient():
    a = boxes(24).repeat_interleave(2, 0)[::2].T.contiguous().T.requires_grad_()
    b = boxes(6, seed=4)[:1].expand(6, 4)
    value = pairwise_box_iou(a, b, [24], [6], kind="giou", convention="pixel")
    (da,) = torch.autograd.grad(value, a, torch.ones(1).expand(144))
    want = reference(a, b, [24], [6], kind="giou", convention="pixel")
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(da, *torch.autograd.grad(want, a, torch.ones(144)))


@pytest.mark.parametrize("sizes", [([], []), ([0], [4]), ([3], [0]), ([0, 0], [0, 0])])
def test_pairwise_box_iou_without_pairs(sizes):
    a, b = boxes(sum(sizes[0])).requires_grad_(), boxes(sum(sizes[1]))
    value = pairwise_box_iou(a, b, *sizes, kind="iou", convention="continuous")
    value.sum().backward()
    assert value.shape == (0,) and not a.grad.any()


def test_pairwise_box_iou_is_a_registered_op():
    a, b = boxes(3).requires_grad_(), boxes(2, seed=1)
    args = (a, b, [1, 2], [1, 1], "giou", "continuous")
    torch.library.opcheck(torch.ops.fastgrpo.pairwise_box_iou_triton.default, args)
