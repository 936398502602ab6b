# SPDX-License-Identifier: Apache-2.0
"""offset_exp: the streaming pass against its formula in float64. C rows, V vocabulary."""

import pytest
import torch

from fastgrpo.ops.linear.head import offset_exp_as
from fastgrpo.ops.select import why_not
from fastgrpo.testing import assert_within_budget

MISSING = why_not("linear_logprob", "cpp", torch.device("cpu"))
IMPLS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(bool(MISSING), reason=str(MISSING)))]


def definition(z, y, inv_t, bias, scale, softcap):
    """(E with E_y = -S, S, f_y, moment)."""
    f = (z if bias is None else z + bias) * scale
    f = f if softcap is None else softcap * torch.tanh(f / softcap)
    f_y = f.gather(1, y[:, None])
    d = (f - f_y) * (1.0 if inv_t is None else inv_t[:, None])
    E = d.exp().scatter(1, y[:, None], 0.0)
    S = E.sum(1)
    return E.scatter(1, y[:, None], -S[:, None]), S, f_y[:, 0], torch.xlogy(E, E).sum(1)


@pytest.mark.parametrize("impl", IMPLS)
# one row, one column, odd, prime, wider than a cache block
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 33), (2, 1031), (5, 300_007)])
@pytest.mark.parametrize("case", ["plain", "temperature", "bias", "softcap"])
def test_against_definition(impl, shape, case):
    C, V = shape
    z, y = torch.randn(C, V) * 3, torch.randint(0, V, (C,))
    inv_t = torch.rand(C) + 0.5 if case == "temperature" else None
    bias = torch.randn(V) if case == "bias" else None
    scale, softcap = (0.7, 5.0) if case == "softcap" else (1.0, None)
    want64 = definition(
        z.double(), y, *(None if x is None else x.double() for x in (inv_t, bias)), scale, softcap
    )
    same = definition(z, y, inv_t, bias, scale, softcap)
    out = offset_exp_as(impl)(
        z.clone(),
        y,
        inv_temperature=inv_t,
        bias=bias,
        logit_scale=scale,
        softcap=softcap,
        entropy=True,
    )
    ours = (out.exps, out.sum_exp, out.target_logit, out.moment)
    for name, a, b, c in zip(("E", "S", "f_y", "moment"), ours, want64, same, strict=True):
        assert_within_budget(a, b, c, factor=4.0, what=f"{impl} {case} {name}")
    assert not out.overflow.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_lies_in_the_front_half_of_each_row(impl):
    z, y = torch.randn(6, 130), torch.randint(0, 130, (6,))
    full = offset_exp_as(impl)(z.clone(), y)
    memory = z.clone()
    half = offset_exp_as(impl)(memory, y, exp_dtype=torch.bfloat16)
    assert half.exps.dtype == torch.bfloat16 and half.exps.stride() == (260, 1)
    assert half.exps.data_ptr() == memory.data_ptr()
    assert torch.equal(half.exps, full.exps.bfloat16())
    assert torch.equal(half.sum_exp, full.sum_exp)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_rows_out_of_range_are_flagged(impl):
    z, y = torch.zeros(6, 9), torch.zeros(6, dtype=torch.int64)
    z[1, 4] = 77.0  # above the limit of 76
    z[2, 4] = 75.0
    z[3, 0] = torch.inf
    z[4, 7] = torch.nan
    z[5, 3] = -torch.inf
    out = offset_exp_as(impl)(z, y, entropy=True)
    assert out.overflow.tolist() == [False, True, False, True, True, False]
    fine = ~out.overflow
    assert out.exps[fine].isfinite().all() and out.moment[fine].isfinite().all()
    assert out.exps[5, 3] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_shards_add_up(impl):
    z, y = torch.randn(5, 40), torch.tensor([0, 11, 12, 25, 39])
    zy = z.gather(1, y[:, None])[:, 0]
    whole = offset_exp_as(impl)(z.clone(), y, entropy=True)
    parts = [
        offset_exp_as(impl)(z[:, a:b].clone(), y - a, entropy=True, target_logit=zy)
        for a, b in ((0, 12), (12, 40))
    ]
    torch.testing.assert_close(sum(p.sum_exp for p in parts), whole.sum_exp)
    torch.testing.assert_close(sum(p.moment for p in parts), whole.moment)
    exps = torch.cat([p.exps for p in parts], 1).scatter(1, y[:, None], 0.0)
    torch.testing.assert_close(exps, whole.exps.scatter(1, y[:, None], 0.0))
