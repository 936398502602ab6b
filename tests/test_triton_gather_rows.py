# SPDX-License-Identifier: Apache-2.0
"""The gather_rows and sum_rows kernels in Triton's interpreter."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)

import torch

import fastgrpo as fg
from fastgrpo.ops.gather_rows import gather_rows, row_index, sum_rows

pytestmark = pytest.mark.interpreter

INDEX = torch.tensor([3, 0, 3, 3, 6, 1, 6])
ROWS = 8


def value_and_grad(f, x, index, impl):
    x = x.detach().requires_grad_()
    y = f(x, index, impl=impl)
    weight = torch.arange(1.0, 1 + y.numel()).view_as(y).to(y.dtype)
    (dx,) = torch.autograd.grad((y * weight).sum(), x)
    return y.detach(), dx


@pytest.mark.parametrize("f", [gather_rows, sum_rows])
@pytest.mark.parametrize(
    "columns", [(1,), (3, 5), (8,), (320,), (1023,), (1025,), (2048,)], ids=str
)  # one, odd, several rows a tile, a widest tile of 1024 columns minus and plus one, two
def test_triton_equals_the_definition(f, columns):
    x = torch.randn(ROWS if f is gather_rows else len(INDEX), *columns)
    index = row_index(INDEX, ROWS)
    for ours, want in zip(
        value_and_grad(f, x, index, "triton"), value_and_grad(f, x, index, "reference"), strict=True
    ):
        assert torch.equal(ours, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_sums_in_float32(dtype):
    x = torch.zeros(1, 4, dtype=dtype, requires_grad=True)
    index = row_index(torch.zeros(512, dtype=torch.int64), 1)
    gather_rows(x, index, impl="triton").sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 512.0))


def test_triton_reads_strided_rows_and_gradients():
    index = row_index(INDEX, ROWS)
    wide = torch.randn(ROWS, 10)
    for x in (wide[:, 3:8], wide[:, ::2], wide.t()[:ROWS, :ROWS].t()):
        x = x.detach().requires_grad_()
        y = gather_rows(x, index, impl="triton")
        assert torch.equal(y, x[INDEX])
        (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient
        assert torch.equal(dx, INDEX.bincount(minlength=ROWS)[:, None].expand_as(x).float())


def test_triton_special_values_stay_in_their_rows():
    x = torch.zeros(ROWS, 2)
    x[3], x[6] = float("nan"), float("inf")
    y = gather_rows(x, row_index(INDEX, ROWS), impl="triton")
    torch.testing.assert_close(y, x[INDEX], equal_nan=True, rtol=0, atol=0)
    z = sum_rows(y, row_index(INDEX, ROWS), impl="triton")
    assert z[3].isnan().all() and z[6].isinf().all() and (z[[0, 1, 2, 4, 5, 7]] == 0).all()


@pytest.mark.parametrize("index, rows, columns", [([], 0, 4), ([], 3, 4), ([2, 2], 3, 0)])
def test_triton_empty(index, rows, columns):
    index = row_index(torch.tensor(index, dtype=torch.int64), rows)
    x = torch.randn(rows, columns, requires_grad=True)
    y = gather_rows(x, index, impl="triton")
    y.sum().backward()
    assert y.shape == (len(index.index), columns) and (x.grad == 0).all()


def test_triton_refuses_float64():
    with pytest.raises(fg.InputError, match="float64"):
        gather_rows(torch.zeros(ROWS, 1).double(), row_index(INDEX, ROWS), impl="triton")


def test_triton_ops_pass_opcheck():
    from fastgrpo_kernels.gather_rows import gather_rows_op, sum_rows_op

    index = row_index(INDEX, ROWS)
    for op, rows in ((gather_rows_op, ROWS), (sum_rows_op, len(INDEX))):
        torch.library.opcheck(op, (torch.randn(rows, 3, requires_grad=True), *index))
