# SPDX-License-Identifier: Apache-2.0
"""The Triton streaming pass against the float64 reference, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels.offset_exp import offset_exp

from fastgrpo.ops.linear.offset_exp import offset_exp as reference
from fastgrpo.testing import assert_within_budget

pytestmark = pytest.mark.interpreter


def case(C, V, seed=0, boost=4.0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(C, V, generator=g) * 3
    targets = torch.randint(0, V, (C,), generator=g)
    logits[torch.arange(C), targets] += boost
    return logits, targets


def run(f, logits, targets, dtype, **options):
    kwargs = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    return f(logits.to(dtype).clone(), targets, **kwargs)


def logp(out):
    return -torch.log1p(out.sum_exp)


def entropy(out):
    return torch.log1p(out.sum_exp) - out.moment / (1 + out.sum_exp)


def check(logits, targets, ours, **options):
    want = run(reference, logits, targets, torch.float64, **options)
    same = run(reference, logits, targets, torch.float32, **options)
    for what, f in (("target logit", lambda o: o.target_logit), ("logp", logp), ("H", entropy)):
        if what != "H" or want.moment is not None:
            assert_within_budget(*(f(out) for out in (ours, want, same)), what=what)
    torch.testing.assert_close(ours.overflow, want.overflow)
    # E of bf16 within one step: the interpreter truncates where a GPU rounds.
    # E of fp32 within |exponent| * eps: the exponent is rounded before it is raised.
    rtol, atol = (2**-7, 1e-7) if ours.exps.dtype == torch.bfloat16 else (0.0, 1e-6)
    p, q = (out.exps.double() / (1 + want.sum_exp[:, None]) for out in (ours, want))
    torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


# one column, primes, one below and above the kernel's block, several blocks
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 97), (2, 1021), (2, 4095), (3, 4097)])
@pytest.mark.parametrize("exp_dtype", [torch.float32, torch.bfloat16])
def test_offset_exp_shapes(shape, exp_dtype):
    logits, targets = case(*shape)
    ours = offset_exp(logits.clone(), targets, entropy=True, exp_dtype=exp_dtype)
    check(logits, targets, ours, entropy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offset_exp_into_other_memory(dtype):
    logits, targets = case(3, 4097)
    memory = torch.zeros(3, 5000, dtype=dtype)
    out = memory[:, 100:4197]
    ours = offset_exp(logits.clone(), targets, entropy=True, out=out)
    same = offset_exp(logits.clone(), targets, entropy=True, exp_dtype=dtype)
    assert ours.exps is out and not memory[:, :100].any() and not memory[:, 4197:].any()
    for name in ("exps", "sum_exp", "target_logit", "moment", "overflow"):
        assert torch.equal(getattr(ours, name), getattr(same, name))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"softcap": 5.0},
        {"logit_scale": 0.25},
        {"inv_temperature": True},
        {"bias": True, "softcap": 30.0, "logit_scale": 2.0, "inv_temperature": True},
    ],
    ids=lambda o: "+".join(o),
)
def test_offset_exp_head_transforms(options):
    logits, targets = case(4, 613)
    options = dict(options)
    if "bias" in options:
        options["bias"] = torch.randn(613)
    if "inv_temperature" in options:
        options["inv_temperature"] = 1 / torch.tensor([0.3, 0.7, 1.0, 2.0])
    ours = offset_exp(logits.clone(), targets, entropy=True, exp_dtype=torch.bfloat16, **options)
    check(logits, targets, ours, entropy=True, **options)


def test_offset_exp_entropy_is_optional():
    logits, targets = case(2, 33)
    assert offset_exp(logits.clone(), targets).moment is None


def test_offset_exp_strided_rows_leave_the_rest_alone():
    logits, targets = case(4, 50)
    buffer = torch.full((8, 64), 7.0)
    view = buffer[::2, :50]
    view.copy_(logits)
    ours = offset_exp(view, targets.repeat_interleave(2)[::2], exp_dtype=torch.bfloat16)
    check(logits, targets, ours)
    assert bool((buffer[1::2] == 7).all()) and bool((buffer[::2, 50:] == 7).all())


def test_offset_exp_empty_chunk():
    ours = offset_exp(torch.empty(0, 9), torch.empty(0, dtype=torch.long), entropy=True)
    assert ours.sum_exp.shape == ours.moment.shape == (0,)


def test_offset_exp_special_values_stay_in_their_rows():
    inf = torch.inf
    plain, targets = case(8, 40, boost=0.0)
    logits = plain.clone()
    j = (targets + 1) % 40
    logits[0] = 2.5  # all equal
    logits[1] += 1e4  # a common offset
    logits[2, torch.arange(40) != targets[2]] = -inf  # certain target
    logits[3, j[3]] = -inf
    logits[4, j[4]] = inf
    logits[5, j[5]] = torch.nan
    logits[6, targets[6]] = -inf
    logits[7, j[7]] = logits[7, targets[7]] + 77  # just past the exponents' limit
    ours = offset_exp(logits.clone(), targets, entropy=True)
    check(logits[:4], targets[:4], type(ours)(*(f[:4] for f in ours)), entropy=True)
    assert ours.overflow.tolist() == [False] * 4 + [True] * 4
    assert ours.sum_exp[2] == 0 and ours.moment[2] == 0


def test_offset_exp_confident_rows_keep_relative_precision():
    logits, targets = case(6, 300, boost=60.0)
    ours = offset_exp(logits.clone(), targets)
    want = run(reference, logits, targets, torch.float64)
    torch.testing.assert_close(ours.sum_exp.double(), want.sum_exp, rtol=1e-4, atol=0)


def test_offset_exp_flags_targets_outside_the_vocabulary():
    logits, targets = case(3, 20)
    targets[1], targets[2] = 20, -100
    ours = offset_exp(logits.clone(), targets, exp_dtype=torch.bfloat16)
    assert ours.overflow.tolist() == [False, True, True]
    assert ours.target_logit[1:].isnan().all()


def test_offset_exp_vocabulary_shards_add_up():
    logits, targets = case(5, 90)
    whole = run(reference, logits, targets, torch.float64, entropy=True)
    zy = logits.gather(1, targets[:, None])[:, 0]
    parts = [
        offset_exp(logits[:, a:b].clone(), targets - a, entropy=True, target_logit=zy)
        for a, b in ((0, 31), (31, 90))
    ]
    for name in ("sum_exp", "moment"):
        total = sum(getattr(p, name).double() for p in parts)
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-5, atol=1e-5)
    exps = torch.cat([p.exps for p in parts], 1)
    exps.scatter_(1, targets[:, None], -sum(p.sum_exp for p in parts)[:, None])
    torch.testing.assert_close(exps.double(), whole.exps, rtol=1e-5, atol=1e-6)


def test_offset_exp_is_a_registered_op():
    logits, targets = case(2, 17)
    head = (targets, torch.ones(2), None, None, 1.0, 20.0, True)
    for overlay, out in ((True, None), (False, torch.empty(2, 17, dtype=torch.bfloat16))):
        args = (logits.clone(), *head, overlay, out)
        torch.library.opcheck(torch.ops.fastgrpo.offset_exp_triton.default, args)
