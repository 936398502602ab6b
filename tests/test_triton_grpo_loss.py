"""The Triton GRPO loss against the float64 reference, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels.token_kl import token_kl

from fastgrpo.losses.metrics import metric_kind
from fastgrpo.losses.tokens import Tokens
from fastgrpo.objective import ESTIMATORS, ROLLOUT_MODES, KLTerm, Objective
from fastgrpo.ops.grpo_loss import checked
from fastgrpo.reference.token_kl import token_kl as token_kl_reference
from fastgrpo.testing import assert_within_budget

pytestmark = pytest.mark.interpreter
# longer than a block, a block, one token, none (in the middle and at the end)
LENGTHS = (300, 1, 0, 256, 37, 5, 0)
STREAMS = ("old_logp", "ref_logp", "rollout_logp", "entropy", "token_weights")


def batch(lengths=LENGTHS, seed=0, per_token=False):
    g = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths, dtype=torch.long)
    seq_ids = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    N = len(seq_ids)

    def noise(scale):
        return scale * torch.randn(N, generator=g)

    logp = -torch.rand(N, generator=g) * 3
    data = {
        "logp": logp,
        "seq_ids": seq_ids,
        "mask": torch.rand(N, generator=g) > 0.2,
        "advantages": torch.randn(N if per_token else len(lengths), generator=g),
        "old_logp": logp + noise(0.3),
        "ref_logp": logp + noise(0.6),
        "rollout_logp": logp + noise(0.3),
        "entropy": torch.rand(N, generator=g) * 2,
        "token_weights": torch.rand(N, generator=g) + 0.5,
    }
    data["advantages"][::3] = 0.0
    for name in ("logp", *STREAMS):  # masked tokens may hold anything
        data[name][~data["mask"]] = torch.tensor([torch.nan, torch.inf, -torch.inf])[
            torch.arange(int((~data["mask"]).sum())) % 3
        ]
    return data


def run(data, obj, dtype, triton, use=STREAMS, kl_terms=(), pull=0.0):
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    leaves = [x["logp"].clone().requires_grad_()]
    streams = {name: x[name] if name in use else None for name in STREAMS}
    if "entropy" in use:
        streams["entropy"] = streams["entropy"].clone().requires_grad_()
        leaves.append(streams["entropy"])
    terms = []
    for term in kl_terms:
        other = term.other_logp.to(dtype).requires_grad_()
        leaves.append(other)
        options = {k: getattr(term, k) for k in ("coefficient", "estimator", "mask")}
        terms.append(KLTerm(other, **options))
    t = Tokens(leaves[0], x["advantages"], x["seq_ids"], x["mask"], **streams)
    call = checked(t, obj, None, None, terms, pull)
    loss, stats = call.loss_and_stats("triton" if triton else "reference")
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), grads, dict(zip(call.names, stats, strict=True))


def check(data, obj, **options):
    ours, want, same = (
        run(data, obj, dtype, triton, **options)
        for dtype, triton in ((torch.float32, True), (torch.float64, False), (torch.float32, False))
    )
    assert_within_budget(ours[0], want[0], same[0], factor=4.0, what="loss")
    for i, (g, w, s) in enumerate(zip(ours[1], want[1], same[1], strict=True)):
        if w is None:
            assert g is None or not g.any()
        else:
            # A shared ratio spreads the rounding of one exp over its sequence.
            assert_within_budget(g, w, s, factor=4.0, what=f"gradient {i}")
    assert not ours[1][0][~data["mask"]].any()
    for name, w in want[2].items():
        value, count = ours[2][name]
        assert metric_kind(name) != "mean" or count == w[1], name
        torch.testing.assert_close(
            value.double(), w[0], rtol=2e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


VARIANTS = {
    "grpo": {"delta": 1.5},
    "bnpo": {"dual_clip": 1.2},
    "dr_grpo": {"max_completion_length": 400},
    "dapo": {"epsilon_high": 0.28},
    "luspo": {},
    "cispo": {"epsilon_high": 1.1},
    "sapo": {},
    "vespo": {"vllm_importance_sampling_mode": "token_truncate"},
    "gmpo": {"epsilon": 0.1},
    "gspo_token": {"epsilon": 0.05, "dual_clip": 1.5},
    "dppo_tv": {"epsilon": 0.05},
    "dppo_kl": {"epsilon": 0.01},
    "gpg": {},
    "dro": {"dro_beta": 0.3},
    "reinforce": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_grpo_loss_of_every_type_with_everything_on(name):
    options = {"beta": 0.1, "entropy_coef": 0.01, "top_entropy_quantile": 0.6} | VARIANTS[name]
    obj = Objective(name, off_policy_mask_threshold=0.01, **options)
    check(batch(), obj, pull=0.02)


@pytest.mark.parametrize("name", VARIANTS)
def test_grpo_loss_of_every_type_on_policy(name):
    check(batch(seed=1), Objective(name, **VARIANTS[name]), use=())


@pytest.mark.parametrize("name", ["grpo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("per_token", [False, True])
def test_grpo_loss_at_sequence_level(name, per_token):
    options = {"epsilon": 0.01, "beta": 0.1} | VARIANTS[name]
    obj = Objective(name, importance_sampling_level="sequence", **options)
    check(batch(seed=2, per_token=per_token), obj)


@pytest.mark.parametrize("mode", ROLLOUT_MODES)
def test_grpo_loss_rollout_corrections(mode):
    data = batch(seed=3)
    data["rollout_logp"][data["mask"].nonzero()[::7, 0]] = torch.nan
    low = 0.8 if mode.endswith("mask") else None
    obj = Objective(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=1.3,
    )
    check(data, obj)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("correct", [False, True])
def test_grpo_loss_kl_estimators(estimator, correct):
    obj = Objective(
        beta=0.5, kl_estimator=estimator, use_bias_correction_kl=correct, kl_value_clamp=1.0
    )
    check(batch(seed=4), obj, use=("old_logp", "ref_logp"))


@pytest.mark.parametrize("name", ["relative cispo", "no correction", "cispo absolute"])
def test_grpo_loss_switches(name):
    options = {
        "relative cispo": {"loss_type": "cispo", "cispo_clip": "relative"},
        "no correction": {"vllm_importance_sampling_correction": False},
        "cispo absolute": {"loss_type": "cispo", "epsilon_high": 5.0},
    }
    check(batch(seed=5), Objective(**options[name]))


def test_grpo_loss_more_kl_streams():
    data = batch(seed=6)
    other = torch.where(data["mask"], data["logp"], 0.0) + 0.3
    some = torch.arange(len(other)) % 2 == 0
    terms = (KLTerm(other, -0.02), KLTerm(other + 1, 0.1, "k2", mask=some))
    check(data, Objective(), use=("old_logp",), kl_terms=terms)


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,), (7, 7), (600,)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_loss_sizes(lengths, level):
    obj = Objective("grpo", importance_sampling_level=level, beta=0.1)
    check(batch(lengths), obj, use=("old_logp", "ref_logp"))


def test_grpo_loss_all_masked_is_exactly_zero():
    data = batch()
    data["mask"][:] = False
    for name in ("logp", *STREAMS):
        data[name][:] = torch.nan
    obj = Objective("gmpo", beta=0.1, off_policy_mask_threshold=0.1)
    loss, (dlogp, _), _ = run(data, obj, torch.float32, True)
    assert loss == 0 and not dlogp.any()


def test_grpo_loss_first_ratio_is_exactly_one():
    data = batch(seed=8)
    data["old_logp"] = data["logp"].clone()
    for level in ("token", "sequence"):
        obj = Objective("grpo", importance_sampling_level=level)
        stats = run(data, obj, torch.float32, True, use=("old_logp",))[2]
        assert stats["ratio/min"][0] == 1 and stats["ratio/max"][0] == 1


def test_grpo_loss_nan_stays_nan_and_extreme_ratios_stay_finite():
    data = batch((4, 4), seed=9)
    data["mask"][:] = True
    for name in ("logp", *STREAMS):
        data[name] = data[name].nan_to_num(0.0, 0.0, 0.0)
    data["logp"][:4] = torch.tensor([0.0, 88.0, 1e4, -1e4])
    data["ref_logp"][:4] = torch.tensor([-1e4, 0.0, -88.0, 20.0])
    data["old_logp"][:4] = 0.0
    check(data, Objective(beta=0.1), use=("old_logp", "ref_logp"))
    data["logp"][5] = torch.nan
    loss, (dlogp,), _ = run(data, Objective(), torch.float32, True, use=("old_logp",))
    assert loss.isnan() and dlogp[:4].isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_token_kl(estimator):
    x = torch.tensor([0.0, 1e-4, -1e-4, 0.3, -0.5, 2.0, -3.0, 25.0, -25.0, 1e4, torch.nan])
    logp, ref = torch.full_like(x, -1.5), x - 1.5
    results = []
    for f, dtype in (
        (token_kl, torch.float32),
        (token_kl_reference, torch.float64),
        (token_kl_reference, torch.float32),
    ):
        p, q = (v.to(dtype).requires_grad_() for v in (logp, ref))
        kl = f(p, q, estimator, 20.0, 10.0)
        results.append((kl.detach(), *torch.autograd.grad(kl[:-1].sum(), (p, q))))
    for name, o, w, s in zip(("kl", "dlogp", "dref"), *results, strict=True):
        assert_within_budget(o, w, s, what=name)


def test_grpo_loss_and_token_kl_are_registered_ops():
    data = batch((3, 2), seed=10)
    logp = data["logp"].nan_to_num(0.0).requires_grad_()
    ref = torch.zeros(5)
    ops = torch.ops.fastgrpo
    torch.library.opcheck(ops.token_kl_triton.default, (logp, ref, "k3", 20.0, 10.0))
    numbers = [0.2, 0.2, 9.0, 9.0, -1.0, 5.0, 0.0, 20.0, 9.0, 0.0, 3.0, 9.0, 0.0, *[1.0] * 7]
    streams = (None, ref, None, None, None, None)
    flags = ("clipped", True, "k3", False, "", False, True, True)
    tokens = (logp, ref, data["seq_ids"], data["mask"], torch.ones(5))
    args = (*tokens, *streams, 2, numbers, *flags)
    torch.library.opcheck(ops.grpo_loss_triton.default, args)
