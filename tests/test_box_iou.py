# SPDX-License-Identifier: Apache-2.0
"""box_iou and pairwise_box_iou: values by hand and by formula, gradients, every implementation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgrpo as fg
from fastgrpo.reference.box_iou import CONVENTIONS, KINDS, LOWEST

BOTH = [(kind, convention) for kind in KINDS for convention in CONVENTIONS]


def needs_cpp():
    import fastgrpo_kernels

    info = fastgrpo_kernels.build_info()["cpp"]
    return pytest.mark.skipif(not info["built"], reason=f"no C++ kernels: {info['reason']}")


def boxes(count: int, dtype=torch.float64, seed: int = 0, scale: float = 20.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * scale
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * scale + 0.1
    return torch.cat([corner, corner + size], 1).to(dtype)


def by_formula(a: list[float], b: list[float], kind: str, convention: str) -> float:
    """One pair of valid boxes with positive areas, in Python floats."""
    one = 1 if convention == "pixel" else 0

    def lengths(box):
        return box[2] - box[0] + one, box[3] - box[1] + one

    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if convention == "vlm_r1":
        inter = w * h if w > 1 and h > 1 else 0.0
    else:
        inter = max(w + one, 0) * max(h + one, 0)
    (aw, ah), (bw, bh) = lengths(a), lengths(b)
    union = aw * ah + bw * bh - inter
    iou = inter / union
    hw = max(a[2], b[2]) - min(a[0], b[0]) + one
    hh = max(a[3], b[3]) - min(a[1], b[1]) + one
    if kind == "iou":
        return iou
    if kind == "giou":
        return iou - max(hw * hh - union, 0) / (hw * hh)
    distance = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
    diou = iou - distance / (hw**2 + hh**2)
    if kind == "diou":
        return diou
    v = 4 / math.pi**2 * (math.atan(aw / ah) - math.atan(bw / bh)) ** 2
    return diou - (v / (1 - iou + v) * v if v else 0.0)


def test_box_iou_by_hand():
    a, b = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    assert fg.box_iou(a, b).item() == pytest.approx(50 / 150)
    assert fg.box_iou(a, b, kind="giou").item() == pytest.approx(50 / 150)
    assert fg.box_iou(a, b, kind="diou").item() == pytest.approx(50 / 150 - 25 / 325)
    assert fg.box_iou(a, b, kind="ciou").item() == pytest.approx(50 / 150 - 25 / 325)
    assert fg.box_iou(a, b, convention="pixel").item() == pytest.approx(66 / (121 + 121 - 66))
    assert fg.box_iou(a, b, convention="vlm_r1").item() == pytest.approx(50 / 150)
    far = torch.tensor([20.0, 0, 30, 10])
    assert fg.box_iou(a, far, kind="giou").item() == pytest.approx(-100 / 300)


def test_box_iou_vlm_r1_counts_no_overlap_of_one_pixel():
    a = torch.tensor([[0, 0, 10, 10], [0, 0, 1, 1], [0, 0, 2, 2]])
    b = torch.tensor([[9, 0, 19, 10], [0, 0, 1, 1], [0, 0, 2, 2]])
    assert fg.box_iou(a, b, convention="vlm_r1").tolist() == [0.0, 0.0, 1.0]
    assert fg.box_iou(a, b).tolist() == pytest.approx([10 / 190, 1.0, 1.0])


@pytest.mark.parametrize(("kind", "convention"), BOTH)
def test_box_iou_is_the_formula(kind, convention):
    a, b = boxes(97), boxes(97, seed=1)
    want = torch.tensor(
        [by_formula(x, y, kind, convention) for x, y in zip(a.tolist(), b.tolist(), strict=True)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(
        fg.box_iou(a, b, kind=kind, convention=convention), want, rtol=0, atol=1e-14
    )
    single = fg.box_iou(a.float(), b.float(), kind=kind, convention=convention)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "convention"), BOTH)
def test_box_iou_gradients(kind, convention):
    a = boxes(23).requires_grad_()
    b = boxes(23, seed=1).requires_grad_()
    if kind != "ciou":
        torch.autograd.gradcheck(
            lambda a, b: fg.box_iou(a, b, kind=kind, convention=convention), (a, b)
        )
    else:  # alpha is a constant: compare with d diou - alpha dv, v differentiated by autograd
        one = 1 if convention == "pixel" else 0
        aw, ah, bw, bh = (x[:, i + 2] - x[:, i] + one for x in (a, b) for i in (0, 1))
        v = 4 / math.pi**2 * (torch.atan(aw / ah) - torch.atan(bw / bh)) ** 2
        iou = fg.box_iou(a, b, convention=convention)
        alpha = (v / (1 - iou + v)).detach()
        diou = fg.box_iou(a, b, kind="diou", convention=convention)
        want = torch.autograd.grad((diou - alpha * v).sum(), (a, b))
        got = torch.autograd.grad(fg.box_iou(a, b, kind=kind, convention=convention).sum(), (a, b))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_box_iou_float32_gradients_are_those_of_float64(kind):
    def run(dtype):
        a, b = (boxes(61, seed=s).float().to(dtype).requires_grad_() for s in (0, 1))
        fg.box_iou(a, b, kind=kind).sum().backward()
        return a.grad.double(), b.grad.double()

    torch.testing.assert_close(run(torch.float32), run(torch.float64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_box_iou_one_side_needs_grad(side):
    pair = [boxes(5), boxes(5, seed=1)]
    pair[side].requires_grad_()
    both = [x.detach().clone().requires_grad_() for x in pair]
    fg.box_iou(*pair, kind="giou").sum().backward()
    fg.box_iou(*both, kind="giou").sum().backward()
    torch.testing.assert_close(pair[side].grad, both[side].grad)
    assert pair[1 - side].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "convention"), BOTH)
def test_box_iou_degenerate_gradients_are_finite(kind, convention, dtype):
    tiny = torch.finfo(dtype).tiny
    big = math.sqrt(torch.finfo(dtype).max) / 5
    rows = [
        [1, 1, 1, 1],  # a point
        [1, 1, 1, 5],  # a line
        [1, 1, 5, 1],
        [0, 0, tiny, tiny],  # areas underflow
        [0, 0, tiny, 1],
        [-big, -big, big, big],  # areas near the largest float
        [-big, -big, -big, big],
        [0, 0, 2, 2],
        [2, 2, 4, 4],  # touches the one before
        [math.nan, 0, 1, 1],
        [0, 0, math.inf, 1],
        [1, 1, 0, 0],
    ]
    grid = torch.tensor(rows, dtype=dtype)
    a = grid[:, None].expand(-1, len(rows), -1).clone().requires_grad_()
    b = grid[None].expand(len(rows), -1, -1).clone().requires_grad_()
    value = fg.box_iou(a, b, kind=kind, convention=convention)
    value.sum().backward()
    assert value.isfinite().all() and a.grad.isfinite().all() and b.grad.isfinite().all()
    assert (value >= LOWEST[kind]).all() and (value <= 1).all()
    assert (value[9:] == LOWEST[kind]).all() and (a.grad[9:] == 0).all()


def test_box_iou_broadcasts_and_takes_strided_and_integer_boxes():
    a, b = boxes(6), boxes(4, seed=1)
    grid = fg.box_iou(a[:, None], b[None])
    assert grid.shape == (6, 4)
    wide = torch.full((6, 8), torch.nan, dtype=torch.float64)
    wide[:, ::2] = a
    torch.testing.assert_close(fg.box_iou(wide[:, None, ::2], b), grid)
    ints = torch.tensor([[0, 0, 10, 10]])
    assert fg.box_iou(ints, ints).dtype == torch.float64
    assert fg.box_iou(ints.half(), ints.half()).dtype == torch.float32
    assert fg.box_iou(torch.empty(0, 4), torch.empty(0, 4)).shape == (0,)


def test_box_iou_says_what_is_wrong():
    good = boxes(2)
    with pytest.raises(fg.InputError, match=r"a: expected shape \(\.\.\., 4\), got \(2, 5\)"):
        fg.box_iou(torch.ones(2, 5), good)
    with pytest.raises(fg.InputError, match="broadcast"):
        fg.box_iou(good, boxes(3))
    with pytest.raises(fg.InputError, match="kind"):
        fg.box_iou(good, good, kind="iiou")
    with pytest.raises(fg.InputError, match="convention"):
        fg.box_iou(good, good, convention="plus_one")
    with pytest.raises(fg.InputError, match="b: expected numbers"):
        fg.box_iou(good, [[0, 0, 1], [0, 0, 1, 1]])
    with pytest.raises(fg.InputError, match=r"a_sizes: expected counts that sum to 2, got 3"):
        fg.pairwise_box_iou(good, good, [3], [2])
    with pytest.raises(fg.InputError, match="b_sizes: expected 1 samples"):
        fg.pairwise_box_iou(good, good, [2], [1, 1])


finite = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, finite, finite, finite), min_size=2, max_size=6))
def test_box_iou_of_anything_is_symmetric_and_in_range(rows):
    grid = torch.tensor(rows, dtype=torch.float64)
    for kind, convention in BOTH:
        value = fg.box_iou(grid[:, None], grid, kind=kind, convention=convention)
        assert ((value >= LOWEST[kind]) & (value <= 1)).all(), (kind, convention)
        torch.testing.assert_close(value, value.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "convention"), BOTH)
def test_pairwise_box_iou_equals_box_iou(kind, convention, dtype, impl):
    # Ragged, with a sample empty on either side, and one wider than a vector register.
    a_sizes, b_sizes = [3, 0, 1, 5, 2], [2, 4, 1, 0, 37]
    a, b = boxes(sum(a_sizes), dtype), boxes(sum(b_sizes), dtype, seed=1)
    a[1], b[0, 3], a[2] = b[1], torch.inf, torch.tensor([4, 4, 4, 4])
    values, offsets = fg.pairwise_box_iou(
        a, b, a_sizes, b_sizes, kind=kind, convention=convention, impl=impl
    )
    assert offsets.tolist() == [0, 6, 6, 7, 7, 81]
    blocks = zip(a.split(a_sizes), b.split(b_sizes), strict=True)
    want = torch.cat(
        [
            fg.box_iou(x[:, None], y[None], kind=kind, convention=convention).flatten()
            for x, y in blocks
        ]
    )
    if kind == "ciou":  # atan2 of the C library and of PyTorch may differ by an ulp
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(values, want, rtol=0, atol=2 * eps)
    else:
        assert torch.equal(values, want)


@needs_cpp()
def test_pairwise_box_iou_cpp_takes_strided_boxes_and_any_number_of_threads():
    a, b = boxes(640), boxes(960, seed=1)
    want, _ = fg.pairwise_box_iou(a, b, [20] * 32, [30] * 32, impl="reference")
    wide = torch.full((640, 8), torch.nan, dtype=torch.float64)
    wide[:, ::2] = a
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            got, _ = fg.pairwise_box_iou(wide[:, ::2], b, [20] * 32, [30] * 32, impl="cpp")
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


def test_pairwise_box_iou_is_differentiable():
    a, b = boxes(5).requires_grad_(), boxes(4, seed=1).requires_grad_()
    torch.autograd.gradcheck(
        lambda a, b: fg.pairwise_box_iou(a, b, [2, 3], [4, 0], kind="giou")[0], (a, b)
    )


@needs_cpp()
def test_pairwise_box_iou_cpp_refuses_gradients():
    a = boxes(2).requires_grad_()
    with pytest.raises(fg.InputError, match="no gradient"):
        fg.pairwise_box_iou(a, boxes(2), [2], [2], impl="cpp")
    with torch.no_grad():
        fg.pairwise_box_iou(a, boxes(2), [2], [2], impl="cpp")


def test_pairwise_box_iou_without_samples_and_without_boxes():
    none = torch.empty(0, 4)
    values, offsets = fg.pairwise_box_iou(none, none, [], [])
    assert values.shape == (0,) and offsets.tolist() == [0]
    values, offsets = fg.pairwise_box_iou(none, none, [0, 0], [0, 0])
    assert values.shape == (0,) and offsets.tolist() == [0, 0, 0]


@needs_cpp()
def test_pairwise_box_iou_cpp_opcheck():
    from fastgrpo_kernels import _cpp

    start = torch.tensor([0, 2, 3])
    args = (boxes(3), boxes(3), start, start, torch.tensor([0, 4, 5]), 5, "giou", "pixel")
    torch.library.opcheck(_cpp.pairwise_box_iou, args)


def test_box_iou_compiles_in_one_graph():
    compiled = torch.compile(
        lambda a, b: fg.box_iou(a, b, kind="ciou"), fullgraph=True, backend="aot_eager"
    )
    a, b = boxes(7), boxes(7, seed=1)
    torch.testing.assert_close(compiled(a, b), fg.box_iou(a, b, kind="ciou"))
