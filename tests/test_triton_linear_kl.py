# SPDX-License-Identifier: Apache-2.0
"""The Triton KL of logits against the float64 reference, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels.linear_kl import kl_of_logits, logit_gradients_

from fastgrpo.ops.linear.kl import kl_of_logits as reference
from fastgrpo.ops.linear.kl import linear_kl
from fastgrpo.testing import assert_within_budget

pytestmark = pytest.mark.interpreter


def case(C, V, near=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_p = torch.randn(C, V, generator=g) * 3
    z_q = z_p + 1e-3 * torch.randn(C, V, generator=g)
    return z_p, z_q if near else torch.randn(C, V, generator=g) * 3


def run(z_p, z_q, dtype):
    leaves = [z.to(dtype).clone().requires_grad_() for z in (z_p, z_q)]
    kl = reference(*leaves)
    weights = torch.linspace(-1, 2, len(kl), dtype=dtype)
    return kl.detach(), torch.autograd.grad((kl * weights).sum(), leaves)


def ours(z_p, z_q, dtype=torch.float32):
    z_p, z_q = z_p.clone(), z_q.clone()
    kl = kl_of_logits(z_p, z_q)
    return kl, logit_gradients_(z_p, z_q, kl, torch.linspace(-1, 2, len(kl)), dtype)


# one column, primes, a block and more than one
@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (5, 97), (2, 2048), (3, 4099)])
@pytest.mark.parametrize("near", [False, True])
def test_linear_kl_kernels_shapes(shape, near):
    z_p, z_q = case(*shape, near)
    kl, grads = ours(z_p, z_q)
    want, same = run(z_p, z_q, torch.float64), run(z_p, z_q, torch.float32)
    assert bool((kl >= 0).all())
    # the normalisers' difference carries two roundings that PyTorch's own order cancels
    assert_within_budget(kl, want[0], same[0], factor=16.0, what="kl")
    for i, grad in enumerate(grads):
        assert_within_budget(grad, want[1][i], same[1][i], factor=16.0, what=f"gradient {i}")


def test_linear_kl_kernels_bf16_gradients_in_place():
    z_p, z_q = case(4, 2500, seed=1)
    _, grads = ours(z_p, z_q, torch.bfloat16)
    for grad, want in zip(grads, run(z_p, z_q, torch.float64)[1], strict=True):
        assert grad.dtype == torch.bfloat16 and grad.stride(0) == 5000
        # one bf16 step: the interpreter truncates where a GPU rounds
        torch.testing.assert_close(grad.double(), want, rtol=2**-7, atol=1e-7)


def test_linear_kl_kernels_special_values_stay_in_their_rows():
    z_p, z_q = case(6, 40, seed=2)
    z_p[1, 3] = -torch.inf
    z_p[2, :3] = z_q[2, :3] = -torch.inf
    z_q[3, 5] = -torch.inf
    z_p[4, 0] = torch.nan
    z_q[5, 0] = torch.inf
    kl, (dp, dq) = ours(z_p, z_q)
    want, (want_p, want_q) = run(z_p, z_q, torch.float64)
    torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert kl[3] == torch.inf and kl[4:].isnan().all()
    torch.testing.assert_close(dp[:3].double(), want_p[:3].nan_to_num(0.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dq[:3].double(), want_q[:3].nan_to_num(0.0), rtol=1e-4, atol=1e-6)


def test_linear_kl_kernels_equal_streams_and_large_offsets():
    z_p, _ = case(3, 300, seed=3)
    kl, grads = ours(z_p, z_p.clone())
    assert not kl.any() and all(not g.any() for g in grads)
    offset = torch.tensor([[-1e4], [1e4], [0.0]])
    kl, _ = ours(z_p + offset, z_p)
    assert bool((kl >= 0).all()) and float(kl.max()) < 1e-5


def test_linear_kl_kernels_strided_and_empty():
    z_p, z_q = case(4, 33, seed=4)
    wide = torch.randn(8, 50)
    wide[::2, :33] = z_p
    torch.testing.assert_close(kl_of_logits(wide[::2, :33], z_q), kl_of_logits(z_p, z_q))
    assert kl_of_logits(z_p[:0], z_q[:0]).shape == (0,)


@pytest.mark.parametrize("need", [(True, True, True, True), (True, False, False, False)])
def test_linear_kl_op_uses_the_kernels(need):
    torch.manual_seed(5)
    shapes = ((7, 6), (65, 6), (7, 4), (65, 4))
    inputs = [torch.randn(s).requires_grad_(n) for s, n in zip(shapes, need, strict=True)]
    wanted = [x for x in inputs if x.requires_grad]
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        kl = linear_kl(*(x.to(dtype) for x in inputs), temperature=0.7, impl=impl)
        results.append((kl.detach(), *torch.autograd.grad(kl.sum(), wanted)))
    torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-5)


def test_linear_kl_kernels_are_registered_ops():
    z_p, z_q = case(2, 9)
    ops = torch.ops.fastgrpo
    torch.library.opcheck(ops.kl_of_logits_triton.default, (z_p, z_q))
    kl = kl_of_logits(z_p, z_q)
    torch.library.opcheck(
        ops.kl_logit_gradients_triton.default, (z_p, z_q, kl, torch.ones(2), True)
    )
