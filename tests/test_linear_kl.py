# SPDX-License-Identifier: Apache-2.0
"""linear_kl and token_kl. N rows, V vocabulary."""

import math

import pytest
import torch

import fastgrpo as fg
from fastgrpo.ops.select import why_not
from fastgrpo.testing import assert_within_budget, relative_error

SIZES = ((13, 6), (19, 6), (13, 4), (19, 4))


def streams(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in SIZES]


def fast(impl):
    """The implementation, its tests skipped where it was not built."""
    reason = why_not("linear_kl", impl, torch.device("cpu"))
    return pytest.param(impl, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


FAST = [fast("torch"), fast("cpp")]


def run(inputs, impl, need=(True,) * 4, **kwargs):
    leaves = [x.clone().requires_grad_(n) for x, n in zip(inputs, need, strict=True)]
    kl = fg.linear_kl(*leaves, impl=impl, **kwargs)
    weights = torch.arange(1.0, len(kl) + 1).cos().to(kl.dtype)
    wanted = [x for x in leaves if x.requires_grad]
    return kl.detach(), torch.autograd.grad((kl * weights).sum(), wanted)


def naive(h_p, w_p, h_q, w_q, T):
    log_p, log_q = (h_p @ w_p.T / T).log_softmax(1), (h_q @ w_q.T / T).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("workspace", [None, 0.001])  # kept, and made again
def test_value_and_every_gradient(impl, workspace):
    inputs = streams()
    kl, grads = run(inputs, impl, temperature=0.7, workspace_mb=workspace)
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = naive(*leaves, 0.7)
    weights = torch.arange(1.0, 14.0).cos().double()
    want_grads = torch.autograd.grad((want * weights).sum(), leaves)
    assert relative_error(kl, want.detach()) < 1e-13
    for a, e in zip(grads, want_grads, strict=True):
        assert relative_error(a, e) < 1e-12


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [None, 0.001])
def test_error_budget(impl, dtype, workspace):
    inputs = streams(dtype)
    kl, grads = run(inputs, impl, workspace_mb=workspace)
    exact, exact_grads = run([x.double() for x in inputs], "reference")
    leaves = [x.clone().requires_grad_() for x in inputs]
    same = naive(*(x.float() for x in leaves), 1.0)
    weights = torch.arange(1.0, 14.0).cos()
    same_grads = torch.autograd.grad((same * weights).sum(), leaves)
    assert_within_budget(kl, exact, same, what="kl")
    for i in range(4):
        assert_within_budget(grads[i], exact_grads[i], same_grads[i], what=f"gradient {i}")


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("i", range(4))
def test_one_gradient_at_a_time(impl, i):
    need = tuple(j == i for j in range(4))
    inputs = streams(torch.float32)
    _, every = run(inputs, impl)
    _, one = run(inputs, impl, need)
    assert len(one) == 1 and torch.equal(one[0], every[i])


@pytest.mark.parametrize("impl", FAST)
def test_of_a_policy_with_itself_is_exactly_zero_and_close_to_itself_positive(impl):
    h, w, _, _ = streams(torch.float32)
    assert (fg.linear_kl(h, w, h, w, impl=impl) == 0).all()
    near = fg.linear_kl(h, w, h * (1 + 1e-4), w, impl=impl)
    exact = fg.linear_kl(h.double(), w.double(), (h * (1 + 1e-4)).double(), w.double())
    assert (near >= 0).all() and relative_error(near, exact) < 1e-2


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_hostile_row_leaves_the_others_bitwise(impl, value):
    inputs = streams(torch.float32)
    clean = fg.linear_kl(*inputs, impl=impl)
    for stream in (0, 2):
        spoilt = [x.clone() for x in inputs]
        spoilt[stream][3, 1] = value
        kl = fg.linear_kl(*spoilt, impl=impl)
        others = torch.arange(13) != 3
        assert torch.equal(kl[others], clean[others]) and kl[3].isnan()


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("N,V", [(0, 5), (1, 1), (2, 1), (1, 300)])
def test_smallest_shapes(impl, N, V):
    inputs = [torch.randn(N, 4), torch.randn(V, 4), torch.randn(N, 3), torch.randn(V, 3)]
    kl, grads = run(inputs, impl)
    assert kl.shape == (N,) and all(g.isfinite().all() for g in grads)
    assert V > 1 or (kl == 0).all()


def test_gradcheck():
    inputs = [x.requires_grad_() for x in streams()]
    assert torch.autograd.gradcheck(lambda *x: fg.linear_kl(*x, temperature=0.8), inputs)


def test_opcheck_and_fullgraph():
    from fastgrpo.ops.linear import kl as module

    inputs = [x.requires_grad_() for x in streams(torch.float32)]
    for keep in ([True, True], [False, True], [False, False]):
        args = (*inputs, 0.7, None, "torch", keep)
        torch.library.opcheck(torch.ops.fastgrpo.linear_kl.default, args)
    compiled = torch.compile(fg.linear_kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), module.linear_kl(*inputs))


def test_strided_inputs():
    inputs = streams(torch.float32)
    kl, grads = run(inputs, "torch")
    strided = [x.T.contiguous().T for x in inputs]
    kl2, grads2 = run(strided, "torch")
    torch.testing.assert_close(kl2, kl)
    for a, e in zip(grads2, grads, strict=True):
        torch.testing.assert_close(a, e)


def test_refusals():
    h_p, w_p, h_q, w_q = streams(torch.float32)
    cases = [
        ("weight_q: expected shape", (h_p, w_p, h_q, w_q[:-1]), {}),
        ("hidden_q: expected shape", (h_p, w_p, h_q[1:], w_q), {}),
        ("hidden_q: expected dtype", (h_p, w_p, h_q.double(), w_q), {}),
        ("temperature", (h_p, w_p, h_q, w_q), {"temperature": 0.0}),
        ("weight_p: expected at least", (h_p, w_p[:0], h_q, w_q[:0]), {}),
        ("impl", (h_p, w_p, h_q, w_q), {"impl": "cuda"}),
        ("impl.*'cpp': hidden is float64", [x.double() for x in streams()], {"impl": "cpp"}),
    ]
    for message, args, kwargs in cases:
        with pytest.raises(fg.InputError, match=message):
            fg.linear_kl(*args, **kwargs)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"])
def test_token_kl_formulas_and_gradients(name):
    logp = torch.randn(50, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(50, dtype=torch.float64)
    kl = fg.token_kl(logp, ref, name)
    x = (ref - logp).detach()
    values = {"k1": -x, "k2": x * x / 2, "k3": x.exp() - 1 - x, "abs": x.abs()}
    slopes = {"k1": torch.ones_like(x), "k2": -x, "k3": 1 - x.exp(), "abs": -x.sign()}
    torch.testing.assert_close(kl.detach(), values[name.rstrip("+")])
    (grad,) = torch.autograd.grad(kl.sum(), logp)
    torch.testing.assert_close(grad, slopes["k2" if "+" in name else name])


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs", "k3+"])
def test_token_kl_extremes(name):
    logp = torch.zeros(6, requires_grad=True)
    ref = torch.tensor([1e4, -1e4, 88.0, -88.0, 20.0, -20.0])
    kl = fg.token_kl(logp, ref, name)
    assert kl.isfinite().all()
    (grad,) = torch.autograd.grad(kl.sum(), logp)
    assert grad.isfinite().all() and (grad[:4] == 0).all()  # beyond the clamp
    assert (fg.token_kl(logp, ref, name, value_clamp=10.0).abs() <= 10).all()


def test_token_kl_k3_is_never_negative_and_keeps_its_precision_near_zero():
    ref = torch.randn(1000) * 1e-4
    kl = fg.token_kl(torch.zeros(1000), ref)
    assert (kl >= 0).all()
    assert relative_error(kl, torch.expm1(ref.double()) - ref.double()) < 1e-3


def test_token_kl_refusals():
    for message, args in (
        ("estimator", (torch.zeros(3), torch.zeros(3), "k4")),
        ("ref_logp: expected shape", (torch.zeros(3), torch.zeros(4))),
        ("logp: expected a floating", (torch.zeros(3).long(), torch.zeros(3))),
    ):
        with pytest.raises(fg.InputError, match=message):
            fg.token_kl(*args)
