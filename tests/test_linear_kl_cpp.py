# SPDX-License-Identifier: Apache-2.0
"""The C++ KL of logits against float64: values, gradients, special logits, layouts, processors."""

import fastgrpo_kernels
import pytest
import torch

from fastgrpo.ops.linear.kl import kl_of_logits as reference
from fastgrpo.testing import assert_within_budget, relative_error

INFO = fastgrpo_kernels.build_info()["cpp"]
pytestmark = pytest.mark.skipif(not INFO["built"], reason=f"no C++ kernels: {INFO['reason']}")


def logits(C, V, near=False):
    z_p = torch.randn(C, V) * 3
    return z_p, z_p + 1e-3 * torch.randn(C, V) if near else torch.randn(C, V) * 3


def run(z_p, z_q, dtype):
    """(KL, its gradients over both logits) by autograd."""
    leaves = [z.to(dtype).clone().requires_grad_() for z in (z_p, z_q)]
    kl = reference(*leaves)
    return kl.detach(), *torch.autograd.grad(kl.sum(), leaves)


def ours(z_p, z_q):
    from fastgrpo_kernels import _cpp

    alone = _cpp.kl_of_logits(z_p.clone(), z_q.clone(), False)
    z_p, z_q = z_p.clone(), z_q.clone()
    kl = _cpp.kl_of_logits(z_p, z_q, True)
    assert torch.equal(kl.nan_to_num(-1.0), alone.nan_to_num(-1.0))
    return kl, z_p, z_q


# One column, a vector, less, more, a prime, and more than the block that is summed in float32.
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 97, 1031, 20011])
@pytest.mark.parametrize("near", [False, True])
def test_linear_kl_cpp_within_budget(V, near):
    z_p, z_q = logits(3, V, near)
    got = ours(z_p, z_q)
    want, same = run(z_p, z_q, torch.float64), run(z_p, z_q, torch.float32)
    assert bool((got[0] >= 0).all())
    # x of close streams is small, and carries the roundings of exponentials near 1.
    for name, g, w, s in zip(("kl", "dz_p", "dz_q"), got, want, same, strict=True):
        assert_within_budget(g, w, s, factor=16.0 if near else 2.0, what=name)


def test_linear_kl_cpp_close_streams_keep_their_precision():
    z_p, _ = logits(4, 5000)
    z_q = z_p + 1e-4 * torch.randn(4, 5000)
    kl, dz_p, dz_q = ours(z_p, z_q)
    want = run(z_p, z_q, torch.float64)
    assert relative_error(kl, want[0]) < 2e-2 and (kl > 0).all()
    assert relative_error(dz_q, want[2]) < 2e-2
    kl, dz_p, dz_q = ours(z_p, z_p.clone())
    assert not kl.any() and not dz_p.any() and not dz_q.any()


def test_linear_kl_cpp_large_offsets():
    z_p, z_q = logits(3, 300)
    z_p += torch.tensor([[-1e4], [1e4], [0.0]])  # a step of 1e-3 in float32
    kl, *_ = ours(z_p, z_q)
    want, *_ = run(z_p, z_q, torch.float64)
    torch.testing.assert_close(kl.double(), want, rtol=1e-4, atol=0)


def test_linear_kl_cpp_special_values_stay_in_their_rows():
    z_p, z_q = logits(8, 40)
    clean = ours(z_p, z_q)
    z_p[1, 3] = -torch.inf
    z_p[2, :3] = z_q[2, :3] = -torch.inf
    z_q[3, 5] = -torch.inf
    z_p[4, 0] = torch.nan
    z_q[5, 0] = torch.inf
    z_p[6] = -torch.inf
    kl, dp, dq = ours(z_p, z_q)
    want, want_p, want_q = run(z_p, z_q, torch.float64)
    torch.testing.assert_close(kl[:6].double(), want[:6], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert kl[3] == torch.inf and kl[4:7].isnan().all()
    torch.testing.assert_close(dp[:3].double(), want_p[:3].nan_to_num(0.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dq[:3].double(), want_q[:3].nan_to_num(0.0), rtol=1e-4, atol=1e-6)
    for now, before in zip((kl, dp, dq), clean, strict=True):
        assert torch.equal(now[[0, 7]], before[[0, 7]])


def test_linear_kl_cpp_rows_of_a_wider_buffer():
    z_p, z_q = logits(6, 33)
    buffer = torch.full((6, 48), 1e4)
    buffer[:, :33] = z_p
    from fastgrpo_kernels import _cpp

    kl = _cpp.kl_of_logits(buffer[:, :33], z_q.clone(), True)
    assert torch.equal(kl, ours(z_p, z_q)[0]) and torch.equal(buffer[:, :33], ours(z_p, z_q)[1])
    assert buffer[:, 33:].eq(1e4).all()
    assert _cpp.kl_of_logits(z_p[:0], z_q[:0], True).shape == (0,)


def test_linear_kl_cpp_any_number_of_threads():
    z_p, z_q = logits(64, 3000)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 3):
            torch.set_num_threads(count)
            runs.append(ours(z_p, z_q))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_linear_kl_cpp_refuses_what_it_cannot_write():
    from fastgrpo_kernels import _cpp

    z = torch.zeros(4, 8)
    with pytest.raises(TypeError):
        _cpp.kl_of_logits(z.double(), z.double(), True)
    with pytest.raises(ValueError, match="z_p: expected rows that do not overlap"):
        _cpp.kl_of_logits(torch.zeros(1, 8).expand(4, 8), z, True)
    with pytest.raises(ValueError, match="z_q: expected the shape of z_p"):
        _cpp.kl_of_logits(z, torch.zeros(4, 7), True)


def test_linear_kl_cpp_opcheck():
    from fastgrpo_kernels import _cpp

    for gradients in (False, True):
        torch.library.opcheck(_cpp.kl_of_logits, (*logits(3, 20), gradients))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_linear_kl_cpp_on_smaller_processors(level):
    from fastgrpo_kernels import _C

    try:
        if _C.limit_isa(level) != level:
            pytest.skip("this processor has no such instructions")
        for near in (False, True):
            test_linear_kl_cpp_within_budget(1031, near)
        test_linear_kl_cpp_special_values_stay_in_their_rows()
    finally:
        _C.limit_isa(2)
