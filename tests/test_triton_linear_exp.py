# SPDX-License-Identifier: Apache-2.0
"""The logits' matmul with the exponential in its epilogue, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels import linear_exp as kernels
from fastgrpo_kernels.linear_exp import linear_exp

import fastgrpo as fg
from fastgrpo.ops.linear import grpo, head, logprob
from fastgrpo.testing import relative_error

pytestmark = pytest.mark.interpreter


def inputs(C, D, V, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(C, D, generator=g).bfloat16()
    weight = (torch.randn(V, D, generator=g) * 2 / D**0.5).bfloat16()
    return x, weight, torch.randint(0, V, (C,), generator=g)


# one tile, rows and columns beyond a tile, several row blocks and depths
@pytest.mark.parametrize("shape", [(5, 16, 40), (130, 72, 264), (260, 8, 128)])
def test_linear_exp_against_float64(shape):
    x, weight, y = inputs(*shape)
    x, weight = x.float(), weight.float()  # the interpreter multiplies no bfloat16
    C, V = len(x), len(weight)
    scale = torch.rand(C) + 0.5
    memory = torch.full((C, 2 * V), torch.nan, dtype=torch.bfloat16)
    exps = memory[:, :V]
    S, c, zy = linear_exp(x, weight, y, scale, exps)
    z = x.double() @ weight.double().t()
    own = z.gather(1, y[:, None])
    E = ((z - own) * scale.double()[:, None]).exp().scatter(1, y[:, None], 0.0)
    want = E.sum(1)
    torch.testing.assert_close(c.double(), own[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zy.double(), own[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(S.double(), want, rtol=2e-5, atol=0)
    E = E.scatter(1, y[:, None], -want[:, None])
    # One bf16 step: the interpreter truncates where a GPU rounds.
    torch.testing.assert_close(exps.double(), E, rtol=2**-7, atol=1e-9)
    assert memory[:, V:].isnan().all()
    again = torch.empty_like(memory)[:, :V]
    assert torch.equal(linear_exp(x, weight, y, scale, again)[0], S) and torch.equal(again, exps)


def test_linear_exp_is_a_registered_op():
    x, weight, y = inputs(3, 8, 24)
    args = (x.float(), weight.float(), y, torch.ones(3), torch.empty(3, 24, dtype=torch.bfloat16))
    torch.library.opcheck(torch.ops.fastgrpo.linear_exp_triton.default, args)


@pytest.mark.parametrize("workspace_mb", [None, 0.01, 1.0])
def test_losses_by_the_epilogue_equal_the_reference(monkeypatch, workspace_mb):
    """The bf16 route of a GPU, products emulated; a row overflows and one target is missing."""

    def mm_wide(a, b, out=None, add=False):
        product = a.float() @ b.float()
        return product if out is None else out.add_(product) if add else out.copy_(product)

    monkeypatch.setattr(kernels, "EPILOGUE", True)
    monkeypatch.setattr(head, "mm_wide", mm_wide)
    for module in (grpo, head, logprob):
        monkeypatch.setattr(module, "bfloat16_products", lambda x: x.dtype == torch.bfloat16)
    calls = []
    monkeypatch.setattr(
        kernels,
        "linear_exp",
        lambda x, w, *rest: calls.append(len(x)) or linear_exp(x.float(), w.float(), *rest),
    )
    x, weight, y = inputs(40, 16, 64, seed=1)
    x[7] = 60.0 * weight[(y[7] + 1) % 64]
    y[11] = -100
    temperature, advantages = torch.rand(40) + 0.5, torch.tensor([1.0, -0.5])
    rest = {"seq_ids": torch.arange(40) // 20, "temperature": temperature, "logit_scale": 0.7}
    results = []
    for impl, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        h, w = (t.to(dtype).requires_grad_() for t in (x, weight))
        obj = fg.Objective("grpo", "sequence")
        options = {"workspace_mb": workspace_mb, "impl": impl, **rest}
        out = fg.linear_grpo_loss(h, w, y, advantages.to(dtype), obj, **options)
        results.append((out.logp, *torch.autograd.grad(out.loss, (h, w))))
    assert sum(calls) >= 39
    (logp, *grads), (want, *want_grads) = results
    torch.testing.assert_close(logp.double(), want, rtol=2e-5, atol=2e-5)
    for grad, exact in zip(grads, want_grads, strict=True):
        assert relative_error(grad, exact) < 8e-3
