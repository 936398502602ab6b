# SPDX-License-Identifier: Apache-2.0
"""The C++ streaming pass against float64: values, sums, special logits, layouts, processors."""

import fastgrpo_kernels
import pytest
import torch

from fastgrpo.ops.linear.offset_exp import offset_exp as torch_offset_exp
from fastgrpo.testing import assert_within_budget

INFO = fastgrpo_kernels.build_info()["cpp"]
pytestmark = pytest.mark.skipif(not INFO["built"], reason=f"no C++ kernels: {INFO['reason']}")

NAMES = ("exps", "sum_exp", "target_logit", "moment")


def offset_exp(*args, **options):
    from fastgrpo_kernels import _cpp

    return _cpp.offset_exp(*args, **options)


def inputs(C, V, scale=8.0):
    return torch.randn(C, V) * scale, torch.randint(0, V, (C,)), torch.rand(C) + 0.5, torch.randn(V)


def check(logits, targets, **options):
    """All results within twice the error of the same pass in PyTorch; the flags equal."""
    wide = {
        k: v.double() if isinstance(v, torch.Tensor) else v
        for k, v in options.items()
        if k != "exp_dtype"
    }
    exact = torch_offset_exp(logits.double(), targets, entropy=True, **wide)
    plain = torch_offset_exp(logits.clone(), targets, entropy=True, **options)
    result = offset_exp(logits.clone(), targets, entropy=True, **options)
    assert torch.equal(result.overflow, plain.overflow)
    kept = ~result.overflow
    for name in NAMES:
        got, want, same = (getattr(r, name)[kept] for r in (result, exact, plain))
        # Each value on its own scale: relative errors, except where float32 has run out of range.
        scale = want.abs().clamp(min=1e-30)
        assert_within_budget(
            (got.double() / scale).float(),
            want / scale,
            (same.double() / scale).float(),
            what=name,
        )
    return result


# V: one vector, less, more, a prime, and more than the block that is summed in float32.
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 127, 1031, 20011])
@pytest.mark.parametrize("exp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_offset_exp_cpp_within_budget(V, exp_dtype, softcap):
    logits, targets, inv_temperature, bias = inputs(5, V)
    targets[0], targets[1] = 0, V - 1
    check(
        logits,
        targets,
        inv_temperature=inv_temperature,
        bias=bias,
        logit_scale=0.7,
        softcap=softcap,
        exp_dtype=exp_dtype,
    )
    check(logits, targets, exp_dtype=exp_dtype)


def test_offset_exp_cpp_every_exponent_is_within_an_ulp():
    exponents = torch.linspace(-104, 76, 500_001)
    logits = torch.cat([torch.zeros(1), exponents])[None].clone()
    offset_exp(logits, torch.tensor([0]))
    exact = exponents.double().exp()
    above = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double()
    ulps = (logits[0, 1:].double() - exact).abs() / (above - exact.float().double())
    assert ulps.max() < 1.2


def test_offset_exp_cpp_collapsed_rows_keep_relative_precision():
    logits = torch.full((3, 64), -80.0)
    logits[:, 5] = torch.tensor([0.0, 5.0, 20.0])  # S from 1e-33 down to 1e-42, a subnormal
    result = offset_exp(logits.clone(), torch.full((3,), 5))
    exact = 63 * (-80.0 - logits[:, 5].double()).exp()
    assert ((result.sum_exp.double() / exact - 1).abs() < torch.tensor([1e-6, 1e-6, 0.05])).all()


def test_offset_exp_cpp_special_logits():
    inf, nan = torch.inf, torch.nan
    logits = torch.zeros(7, 40)
    logits[0, 1:9] = -inf  # p = 0, and 0 * -inf counts as 0
    logits[1, 1:] = -inf  # only the target is left
    logits[2, 30] = inf
    logits[3, 31] = nan
    logits[4, 0] = -inf  # the target itself
    logits[5, 20] = 77.0  # beyond the largest exponent
    logits[6] = -inf
    result = offset_exp(logits, torch.zeros(7, dtype=torch.int64), entropy=True)
    assert result.overflow.tolist() == [False, False, True, True, True, True, True]
    assert result.sum_exp[:2].tolist() == [31.0, 0.0] and result.moment[:2].tolist() == [0.0, 0.0]
    assert result.exps[0, 1:9].eq(0).all() and result.exps[0, 0] == -31.0
    assert result.exps[1].eq(0).all()


def test_offset_exp_cpp_targets_of_another_shard():
    logits, targets, inv_temperature, bias = inputs(4, 50)
    whole = offset_exp(logits.clone(), targets, entropy=True)
    parts = [
        offset_exp(logits[:, s].clone(), targets - s.start, entropy=True, target_logit=zy)
        for s in (slice(0, 20), slice(20, 50))
        for zy in [whole.target_logit]
    ]
    for name in ("sum_exp", "moment"):
        added = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(added, getattr(whole, name), rtol=1e-6, atol=1e-6)
    lost = offset_exp(logits.clone(), torch.tensor([0, 50, -100, 3]))
    assert lost.overflow.tolist() == [False, True, True, False]
    assert lost.sum_exp.isnan().tolist() == [False, True, True, False]


def test_offset_exp_cpp_rows_of_a_wider_buffer():
    logits, targets, *_ = inputs(6, 33)
    buffer = torch.full((6, 48), 1e4)
    buffer[:, :33] = logits
    view = offset_exp(buffer[:, :33], targets, exp_dtype=torch.bfloat16)
    whole = offset_exp(logits, targets, exp_dtype=torch.bfloat16)
    assert torch.equal(view.exps, whole.exps) and torch.equal(view.sum_exp, whole.sum_exp)
    assert buffer[:, 33:].eq(1e4).all()
    empty = offset_exp(torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    assert empty.sum_exp.shape == (0,)


def test_offset_exp_cpp_any_number_of_threads():
    logits, targets, *_ = inputs(64, 3000)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 3):
            torch.set_num_threads(count)
            runs.append(offset_exp(logits.clone(), targets, entropy=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(getattr(runs[0], n), getattr(runs[1], n)) for n in NAMES)


def test_offset_exp_cpp_refuses_what_it_cannot_write():
    targets = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError):
        offset_exp(torch.zeros(4, 8, dtype=torch.float64), targets)
    with pytest.raises(ValueError, match="rows that do not overlap"):
        offset_exp(torch.zeros(1, 8).expand(4, 8), targets)
    with pytest.raises(ValueError, match="a contiguous last dimension"):
        offset_exp(torch.zeros(8, 4).T, targets)
    with pytest.raises(ValueError, match="targets"):
        offset_exp(torch.zeros(4, 8), targets[:3])


def test_offset_exp_cpp_opcheck():
    from fastgrpo_kernels import _cpp

    logits, targets, inv_temperature, bias = inputs(3, 20)
    args = (logits, targets, inv_temperature, bias, None, 0.5, 30.0, True, False)
    torch.library.opcheck(_cpp._offset_exp, args)
    torch.library.opcheck(_cpp._offset_exp, (logits, targets, *[None] * 3, 1.0, None, False, True))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_offset_exp_cpp_on_smaller_processors(level):
    from fastgrpo_kernels import _C

    try:
        if _C.limit_isa(level) != level:
            pytest.skip("this processor has no such instructions")
        test_offset_exp_cpp_every_exponent_is_within_an_ulp()
        test_offset_exp_cpp_special_logits()
        for softcap in (None, 5.0):
            test_offset_exp_cpp_within_budget(1031, torch.bfloat16, softcap)
    finally:
        _C.limit_isa(2)
