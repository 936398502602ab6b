# SPDX-License-Identifier: Apache-2.0
"""The Triton weighting of exponentials against its formula in float64, under the interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels.weigh_exps import weigh_exps_

pytestmark = pytest.mark.interpreter


def formula(E, y, g, h, c, T, middle, at_target, softcap):
    ln = E.double().log().clamp(min=-1e4)
    factor = g[:, None].double()
    if h is not None:
        factor = factor + h[:, None] * (ln + c[:, None])
    if T is not None:
        f = ((T[:, None] * ln + middle[:, None]) / softcap).clamp(-1, 1)
        factor = factor * (1 - f * f)
    out = E.double() * factor
    here = (y >= 0) & (y < E.shape[1])
    out[here, y[here]] = at_target[here].double()
    return out


# one column, primes, a block and more than one
@pytest.mark.parametrize("shape", [(1, 1), (3, 97), (2, 2048), (3, 4099)])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weigh_exps(shape, entropy, softcap, dtype):
    C, V = shape
    E = torch.randn(C, 2 * V).mul(4).exp().to(dtype)[:, :V]
    E[:, ::7] = 0.0
    y = torch.randint(0, V, (C,))
    y[0] = V  # the target of another shard
    E[range(1, C), y[1:]] = -2.0
    g, h, c, T, middle, at_target = torch.rand(6, C) + 0.5
    pair = (h, c) if entropy else (None, None)
    cap = (T, middle) if softcap else (None, None)
    want = formula(E, y, g, *pair, *cap, at_target, softcap)
    weigh_exps_(E, y, g, *pair, *cap, at_target, softcap or 1.0)
    # one bf16 step: the interpreter truncates where a GPU rounds
    # near the cap 1 - f^2 cancels to the rounding of f
    rtol = 2**-7 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(E.double(), want, rtol=rtol, atol=1e-5)
    assert not E[0, ::7].any()


def test_weigh_exps_is_a_registered_op():
    E, y, row = torch.rand(2, 9), torch.tensor([0, 8]), torch.ones(2)
    args = (E, y, row, row, row, None, None, row, 1.0)
    torch.library.opcheck(torch.ops.fastgrpo.weigh_exps_triton.default, args)
