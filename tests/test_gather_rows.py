# SPDX-License-Identifier: Apache-2.0
"""gather_rows and sum_rows against their definition: values, gradients, layouts, refusals."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo.ops.gather_rows import gather_rows, row_index, sum_rows
from fastgrpo.reference import gather_rows as reference

INDEX = torch.tensor([3, 0, 3, 3, 6, 1, 6])  # rows read thrice, once, never (2, 4, 5, 7)
ROWS = 8


def test_gather_rows_takes_rows_of_any_shape():
    x = torch.randn(ROWS, 3, 5)
    assert torch.equal(gather_rows(x, row_index(INDEX, ROWS)), x[INDEX])


def test_sum_rows_adds_duplicates_and_leaves_absent_rows_zero():
    x = torch.arange(7.0)[:, None]
    want = torch.tensor([1.0, 5.0, 0.0, 0.0 + 2.0 + 3.0, 0.0, 0.0, 4.0 + 6.0, 0.0])[:, None]
    assert torch.equal(sum_rows(x, row_index(INDEX, ROWS)), want)


@pytest.mark.parametrize("f, rows", [(gather_rows, ROWS), (sum_rows, len(INDEX))])
def test_gather_and_sum_are_differentiable_twice(f, rows):
    x = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    index = row_index(INDEX, ROWS)
    assert torch.autograd.gradcheck(lambda x: f(x, index), x)
    assert torch.autograd.gradgradcheck(lambda x: f(x, index), x)


@pytest.mark.parametrize("f, rows", [(gather_rows, ROWS), (sum_rows, len(INDEX))])
def test_torch_path_equals_the_definition_in_bfloat16(f, rows):
    x = torch.randn(rows, 5).bfloat16().requires_grad_()
    index = row_index(INDEX, ROWS)
    results = []
    for impl in ("torch", "reference"):
        y = f(x, index, impl=impl)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y) / 3)
        results.append((y, dx))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_gradient_of_a_row_read_often_is_summed_in_float32():
    # 512 times 1/512 of a bfloat16 sum: adding in bfloat16 stops growing at 256 times the term.
    x = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    y = gather_rows(x, row_index(torch.zeros(512, dtype=torch.int64), 1))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 512.0))


def test_gather_rows_reads_strided_rows():
    x = torch.randn(6, ROWS).t()
    assert torch.equal(gather_rows(x, row_index(INDEX, ROWS)), x[INDEX])


@pytest.mark.parametrize("index, rows", [([], 0), ([], 3), ([0], 1)])
def test_gather_rows_edges(index, rows):
    index = row_index(torch.tensor(index, dtype=torch.int64), rows)
    x = torch.randn(rows, 4, requires_grad=True)
    y = gather_rows(x, index)
    assert y.shape == (len(index.index), 4)
    y.sum().backward()
    assert torch.equal(x.grad, reference.sum_rows(torch.ones_like(y), index.index, rows))


@pytest.mark.parametrize("bad", [-1, 8, 2**40])
def test_row_index_names_the_entry_out_of_range(bad):
    with pytest.raises(fg.InputError, match=rf"index: entry 1 is {bad}"):
        row_index(torch.tensor([0, bad]), ROWS)


def test_gather_rows_names_what_does_not_fit():
    index = row_index(INDEX, ROWS)
    with pytest.raises(fg.InputError, match="x: expected 8 rows"):
        gather_rows(torch.randn(7, 2), index)
    with pytest.raises(fg.InputError, match="x: expected 7 rows"):
        sum_rows(torch.randn(8, 2), index)
    with pytest.raises(fg.InputError, match="x: expected a floating tensor"):
        gather_rows(torch.zeros(8, 2, dtype=torch.int64), index)
    with pytest.raises(fg.InputError, match="impl"):
        gather_rows(torch.randn(8, 2), index, impl="cpp")


def test_gather_rows_compiles_into_one_graph():
    index = row_index(INDEX, ROWS)
    x = torch.randn(ROWS, 2, requires_grad=True)

    def f(x):
        return (gather_rows(x * 2, index) ** 2).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x), x)
    (want,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(got, want)
