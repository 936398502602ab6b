# SPDX-License-Identifier: Apache-2.0
"""The Triton KL estimators against the float64 reference, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels.token_kl import token_kl

from fastgrpo.errors import InputError
from fastgrpo.objective import ESTIMATORS
from fastgrpo.ops.token_kl import token_kl as public_token_kl
from fastgrpo.reference.token_kl import token_kl as reference
from fastgrpo.testing import assert_within_budget

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_token_kl(estimator):
    x = torch.tensor([0.0, 1e-4, -1e-4, 0.3, -0.5, 2.0, -3.0, 25.0, -25.0, 1e4, torch.nan])
    logp, ref = torch.full_like(x, -1.5), x - 1.5
    results = []
    for f, dtype in (
        (token_kl, torch.float32),
        (reference, torch.float64),
        (reference, torch.float32),
    ):
        p, q = (v.to(dtype).requires_grad_() for v in (logp, ref))
        kl = f(p, q, estimator, 20.0, 10.0)
        results.append((kl.detach(), *torch.autograd.grad(kl[:-1].sum(), (p, q))))
    for name, o, w, s in zip(("kl", "dlogp", "dref"), *results, strict=True):
        assert_within_budget(o, w, s, what=name)


def test_token_kl_chooses_its_kernel():
    logp, ref = -torch.rand(2, 7)
    for dtype in (torch.float32, torch.bfloat16):
        ours = public_token_kl(logp.to(dtype), ref.to(dtype), impl="triton")
        want = public_token_kl(logp.to(dtype).double(), ref.to(dtype).double(), impl="reference")
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), want, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)
    with pytest.raises(InputError, match="float64"):
        public_token_kl(logp.double(), ref, impl="triton")


def test_token_kl_is_a_registered_op():
    logp = (-torch.rand(5)).requires_grad_()
    args = (logp, torch.zeros(5), "k3", 20.0, 10.0)
    torch.library.opcheck(torch.ops.fastgrpo.token_kl_triton.default, args)
