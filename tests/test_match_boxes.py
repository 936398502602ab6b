# SPDX-License-Identifier: Apache-2.0
"""match_boxes: equal to scipy and to brute force, ties, masks, thresholds, every implementation."""

from itertools import permutations

import fastgrpo_kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import fastgrpo as fg
from fastgrpo.reference.match_boxes import METHODS

INFO = fastgrpo_kernels.build_info()["cpp"]
CPP = pytest.mark.skipif(not INFO["built"], reason=f"no C++ kernels: {INFO['reason']}")
IMPLS = ["reference", pytest.param("cpp", marks=CPP)]


def match(scores, impl, **options) -> list[int]:
    """One problem, a (rows, cols) matrix."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    rows, cols = scores.shape
    mask = options.pop("mask", None)
    return fg.match_boxes(
        scores.flatten(),
        [0, rows * cols],
        [rows],
        [cols],
        mask=None if mask is None else torch.as_tensor(mask).flatten(),
        impl=impl,
        **options,
    ).tolist()


def total(scores, columns) -> float:
    taken = [c for c in columns if c >= 0]
    assert len(set(taken)) == len(taken), "a column was given twice"
    return sum(float(scores[row][col]) for row, col in enumerate(columns) if col >= 0)


def uniform(rows, cols, seed=0):
    return torch.rand(
        rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


PROBLEMS = {
    "random": uniform(31, 31),
    "wide": uniform(7, 50),
    "tall": uniform(50, 7),
    "one by one": uniform(1, 1),
    "one row": uniform(1, 9),
    "one column": uniform(9, 1),
    "ties": (uniform(40, 33) * 4).floor(),
    "zeros and ones": (uniform(64, 64) > 0.9).double(),
    "all equal": torch.full((23, 29), 0.5, dtype=torch.float64),
    "all zero": torch.zeros(17, 17, dtype=torch.float64),
    "negative": -uniform(20, 25) * 100,
    "offsets per row": uniform(60, 60) * 1e-3 + uniform(60, 1, 1) * 50,
    "offsets per column": uniform(60, 60) * 1e-3 + uniform(1, 60, 1) * 50,
    "product": torch.outer(torch.arange(80.0), torch.arange(80.0)).double(),  # hard for bids
    "reverse product": -torch.outer(torch.arange(80.0), torch.arange(80.0)).double(),
    "large numbers": uniform(12, 12) * 1e90,
    "256": uniform(256, 256),
    "256 integers": (uniform(256, 256) * 100).floor(),
    "200 by 256": uniform(200, 256),
    "256 by 100": uniform(256, 100),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_match_boxes_optimal_value_is_scipys(name, impl):
    scores = PROBLEMS[name]
    columns = match(scores, impl)
    rows, cols = linear_sum_assignment(scores.numpy(), maximize=True)
    want = scores.numpy()[rows, cols].sum()
    assert sum(c >= 0 for c in columns) == min(scores.shape)
    assert total(scores, columns) == pytest.approx(want, rel=1e-12, abs=1e-12)


def best_by_force(scores, allowed) -> tuple[int, float]:
    """The most allowed pairs, and the largest sum among the matchings that have as many."""
    rows, cols = scores.shape
    flip = rows > cols
    scores, allowed = (scores.T, allowed.T) if flip else (scores, allowed)
    best = (0, 0.0)
    for choice in permutations(range(max(rows, cols)), min(rows, cols)):
        pairs = [(i, j) for i, j in enumerate(choice) if allowed[i, j]]
        best = max(best, (len(pairs), sum(float(scores[i, j]) for i, j in pairs)))
    return best


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(12))
def test_match_boxes_optimal_with_forbidden_pairs_is_brute_force(seed, impl):
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(1, 6, 2)
    scores = torch.tensor(rng.normal(size=(rows, cols)))
    mask = torch.tensor(rng.random((rows, cols)) < 0.5)
    threshold = None if seed % 3 else -0.5
    allowed = mask if threshold is None else mask & (scores >= threshold)
    columns = match(scores, impl, mask=mask, threshold=threshold)
    assert all(c < 0 or allowed[r, c] for r, c in enumerate(columns))
    count, value = best_by_force(scores, allowed)
    assert sum(c >= 0 for c in columns) == count
    assert total(scores, columns) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_match_boxes_everything_forbidden(impl):
    scores = uniform(4, 5)
    for method in METHODS:
        assert match(scores, impl, method=method, mask=torch.zeros(4, 5, dtype=bool)) == [-1] * 4
        assert match(scores, impl, method=method, threshold=2.0) == [-1] * 4
        assert match(scores * torch.nan, impl, method=method) == [-1] * 4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS)
def test_match_boxes_never_takes_a_score_that_is_not_a_number(method, impl):
    scores = uniform(6, 6)
    scores[0, 0], scores[1, 1], scores[2, 2], scores[3] = torch.nan, torch.inf, -torch.inf, 1e300
    columns = match(scores, impl, method=method)
    assert columns[3] == -1 and sum(c >= 0 for c in columns) == 5
    assert all(columns[i] != i for i in range(3))


@pytest.mark.parametrize("impl", IMPLS)
def test_match_boxes_greedy_by_hand(impl):
    scores = [[0.8, 0.9, 0.1], [0.7, 0.95, 0.2], [0.1, 0.1, 0.1]]
    assert match(scores, impl, method="greedy") == [0, 1, 2]
    assert match(scores, impl, method="greedy_rows") == [1, 0, 2]
    assert match(scores, impl, method="greedy", threshold=0.5) == [0, 1, -1]
    assert match(scores, impl, method="greedy", threshold=0.8) == [0, 1, -1]  # inclusive
    assert match([[1.0, 1.0], [1.0, 1.0]], impl, method="greedy") == [0, 1]
    assert match([[0.5, 0.5], [0.5, 0.6]], impl, method="greedy_rows") == [0, 1]
    labels = torch.tensor([[False, True, True], [True, False, True], [True, True, False]])
    assert match(scores, impl, method="greedy", mask=labels) == [1, 0, -1]


def greedy_by_hand(scores, allowed):
    """Sort all pairs by score, row and column, and take what is free."""
    pairs = sorted((-float(scores[i, j]), i, j) for i, j in allowed.nonzero().tolist())
    columns, taken = [-1] * len(scores), set()
    for _, i, j in pairs:
        if columns[i] < 0 and j not in taken:
            columns[i] = j
            taken.add(j)
    return columns


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(0, 10**6),
    st.sampled_from([None, 0.0, 1.0, 2.0]),
)
def test_match_boxes_properties(rows, cols, seed, threshold):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.integers(-1, 4, (rows, cols)).astype(float)).reshape(rows, cols)
    mask = torch.tensor(rng.random((rows, cols)) < 0.7).reshape(rows, cols)
    allowed = mask if threshold is None else mask & (scores >= threshold)
    impls = ["reference"] + ["cpp"] * INFO["built"]
    sums = {}
    for method in METHODS:
        for impl in impls:
            columns = match(scores, impl, method=method, threshold=threshold, mask=mask)
            assert len(columns) == rows
            assert all(c < 0 or allowed[r, c] for r, c in enumerate(columns))
            sums[method, impl] = total(scores, columns), sum(c >= 0 for c in columns)
            if method == "greedy":
                assert columns == greedy_by_hand(scores, allowed)
    for impl in impls:
        assert sums["optimal", impl] == sums["optimal", "reference"]
        assert sums["optimal", impl][1] >= sums["greedy", impl][1]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS)
def test_match_boxes_ragged_batch_is_one_by_one(method, impl):
    rng = np.random.default_rng(0)
    a_sizes, b_sizes = rng.integers(0, 9, 40).tolist(), rng.integers(0, 9, 40).tolist()
    blocks = [
        torch.tensor(rng.random((n, m))).reshape(n, m)
        for n, m in zip(a_sizes, b_sizes, strict=True)
    ]
    scores = torch.cat([b.flatten() for b in blocks])
    offsets = torch.tensor([0, *(b.numel() for b in blocks)]).cumsum(0)
    together = fg.match_boxes(
        scores, offsets, torch.tensor(a_sizes), b_sizes, method=method, threshold=0.3, impl=impl
    )
    alone = [c for b in blocks for c in match(b, impl, method=method, threshold=0.3)]
    assert together.dtype == torch.int64 and together.tolist() == alone


@CPP
def test_match_boxes_cpp_any_number_of_threads_and_float32():
    scores = uniform(300 * 20, 12).flatten().float()
    sizes, offsets = ([20] * 300, [12] * 300), torch.arange(301) * 240
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(fg.match_boxes(scores, offsets, *sizes, impl="cpp"))
        doubled = fg.match_boxes(scores.double(), offsets, *sizes, impl="cpp")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run, doubled) for run in runs)


def test_match_boxes_composes_with_pairwise_box_iou():
    gt = torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 4, 4]])
    values, offsets = fg.pairwise_box_iou(gt[[1, 0, 2]], gt, [2, 1], [2, 1])
    assert fg.match_boxes(values, offsets, [2, 1], [2, 1], threshold=0.5).tolist() == [1, 0, 0]


def test_match_boxes_without_samples():
    assert fg.match_boxes(torch.empty(0), [0], [], []).tolist() == []
    assert fg.match_boxes(torch.empty(0), [0, 0, 0], [3, 0], [0, 2]).tolist() == [-1] * 3


def test_match_boxes_says_what_is_wrong():
    scores = torch.rand(6)
    with pytest.raises(fg.InputError, match=r"scores: expected shape \(pairs\) with pairs=6"):
        fg.match_boxes(scores[:5], [0, 6], [2], [3])
    with pytest.raises(fg.InputError, match="scores: expected a tensor"):
        fg.match_boxes([0.5], [0, 1], [1], [1])
    with pytest.raises(fg.InputError, match="offsets: expected the running sum"):
        fg.match_boxes(scores, [0, 5], [2], [3])
    with pytest.raises(fg.InputError, match="mask: expected dtype torch.bool"):
        fg.match_boxes(scores, [0, 6], [2], [3], mask=scores)
    with pytest.raises(fg.InputError, match="method"):
        fg.match_boxes(scores, [0, 6], [2], [3], method="hungarian")
    with pytest.raises(fg.InputError, match="threshold: expected a number"):
        fg.match_boxes(scores, [0, 6], [2], [3], threshold=float("nan"))
    with pytest.raises(fg.InputError, match="counts >= 0"):
        fg.match_boxes(scores, [0, 6], [-2], [-3])
    with pytest.raises(fg.InputError, match="cuda"):
        fg.match_boxes(scores, [0, 6], [2], [3], impl="cuda")


@CPP
def test_match_boxes_cpp_opcheck():
    from fastgrpo_kernels import _cpp

    starts = torch.tensor([0, 2]), torch.tensor([0, 3]), torch.tensor([0, 6])
    torch.library.opcheck(_cpp.match_boxes, (torch.rand(6), None, *starts, 2, "optimal", None))
    mask = torch.ones(6, dtype=torch.bool)
    torch.library.opcheck(_cpp.match_boxes, (torch.rand(6), mask, *starts, 2, "greedy", 0.5))
