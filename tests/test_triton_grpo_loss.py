# SPDX-License-Identifier: Apache-2.0
"""The Triton GRPO loss against the float64 reference, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels import grpo_loss as kernels
from fastgrpo_kernels.grpo_loss import grpo_slopes
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.losses.metrics import metric_kind
from fastgrpo.losses.tokens import Tokens
from fastgrpo.objective import AGGREGATIONS, ESTIMATORS, ROLLOUT_MODES, KLTerm, Objective
from fastgrpo.ops import grpo_loss as ops
from fastgrpo.ops.grpo_loss import checked, grpo_loss
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


def run(
    data, obj, dtype, triton, use=STREAMS, kl_terms=(), pull=0.0, totals=(None, None), given=False
):
    floats = {k: v.to(dtype) for k, v in data.items() if k not in ("seq_ids", "mask")}
    x = data | floats
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
    call = checked(t, obj, *totals, terms, pull)
    if not triton or terms or given:
        call = call.per_token()
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


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("totals", [(None, None), (torch.tensor(77), 5.0)])
def test_grpo_loss_denominators(mode, totals):
    obj = Objective(
        aggregation=mode, max_completion_length=400, entropy_coef=0.01, top_entropy_quantile=0.6
    )
    check(batch((40, 0, 3), seed=11), obj, use=("old_logp", "entropy"), totals=totals)


@pytest.mark.parametrize("name", ["dapo", "gmpo", "vespo"])
def test_grpo_loss_takes_the_weights_of_tokens(name):
    """As the chunks of a fused projection give them, which see only a part of a sequence."""
    obj = Objective(
        name, beta=0.1, entropy_coef=0.01, **{"vllm_importance_sampling_mode": "token_mask"}
    )
    check(batch((40, 0, 3), seed=12), obj, given=True)


LONG = (700, 3, 256, 0, 513)  # three pieces, less than one, exactly one, none, two and a token


@pytest.mark.parametrize(
    "obj",
    [
        Objective("dapo", beta=0.1),
        Objective("grpo", "sequence", epsilon=0.01, beta=0.1),
        Objective("gmpo", vllm_importance_sampling_mode="geometric_truncate"),
    ],
    ids=["apart", "sequence ratio", "gmpo"],
)
def test_grpo_loss_of_sequences_in_pieces(obj, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 256)
    data = batch(LONG, seed=13)
    check(data, obj, use=("old_logp", "ref_logp", "rollout_logp"))
    first, again = (run(data, obj, torch.float32, True) for _ in range(2))
    assert first[0] == again[0] and torch.equal(first[1][0], again[1][0])
    assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])
    # The same sequences behind another one: the same bits, wherever a piece lies.
    moved = batch((300, *LONG), seed=14)
    for name in ("mask", "logp", *STREAMS):
        moved[name][300:] = data[name]
    moved["advantages"][1:] = data["advantages"]
    totals = (1, 1)
    one, other = (run(x, obj, torch.float32, True, totals=totals)[1][0] for x in (data, moved))
    assert torch.equal(one, other[300:])


def test_grpo_loss_without_a_mask_and_strided():
    data = batch((30, 7), seed=15)
    data["mask"][:] = True
    for name in ("logp", *STREAMS):
        data[name] = data[name].nan_to_num(0.0, 0.0, 0.0)
    want = run(data, Objective(beta=0.1), torch.float32, True)
    data["mask"] = None
    for name in ("logp", *STREAMS):
        data[name] = torch.stack([data[name], data[name] * 0 - 7], 1)[:, 0]
    ours = run(data, Objective(beta=0.1), torch.float32, True)
    assert ours[0] == want[0] and torch.equal(ours[1][0], want[1][0])


def test_grpo_loss_in_lower_precision():
    data = batch((30, 7), seed=16)
    for name in ("logp", *STREAMS):
        data[name] = data[name].bfloat16()
    loss, grads, _ = run(data, Objective(beta=0.1), torch.bfloat16, True)
    want, want_grads, _ = run(data, Objective(beta=0.1), torch.float64, False)
    assert loss.dtype == grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), want, rtol=1e-2, atol=0)
    torch.testing.assert_close(grads[0].double(), want_grads[0], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["dapo", "gspo_token", "gmpo"])
def test_grpo_slopes_are_the_gradients(name):
    data = batch((40, 0, 3), seed=17)
    other = torch.where(data["mask"], data["logp"], 0.0) + 0.3
    some = torch.arange(len(other)) % 2 == 0
    terms = (KLTerm(other, -0.02), KLTerm(other + 1, 0.1, "k2", mask=some))
    obj = Objective(name, beta=0.1, entropy_coef=0.01)
    logp, entropy = (data[k].clone().requires_grad_() for k in ("logp", "entropy"))
    rest = {k: data[k] for k in ("advantages", "seq_ids", "mask", "old_logp", "ref_logp")}
    call = checked(Tokens(logp, entropy=entropy, **rest), obj, None, None, terms, 0.0).per_token()
    want = torch.autograd.grad(call.loss_and_stats("triton")[0], (logp, entropy))
    for ours, grad in zip(grpo_slopes(*call[:6]), want, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-6, atol=1e-9)


class Dispatched(TorchDispatchMode):
    """Counts the operations dispatched, also inside our own ops."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        for name in ("grpo_loss_triton", "grpo_gradient_triton"):
            functions = OPDEFS[f"fastgrpo::{name}"]._backend_fns
            for device, function in functions.items():
                monkeypatch.setitem(functions, device, self.inside(function))

    def inside(self, function):
        def run(*args):
            with self:
                return function(*args)

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_grpo_loss_dispatches_at_most_eight_operations(monkeypatch):
    data = batch((30, 7), seed=18)
    launched = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(ops, "_check_seq_ids", lambda *_: None)  # read on the CPU only
    logp, one = data["logp"].requires_grad_(), torch.ones(())
    streams = {name: data[name] for name in ("old_logp", "ref_logp", "rollout_logp")}
    for obj in (
        Objective(beta=0.1),
        Objective("grpo", "sequence"),
        Objective("vespo", beta=0.1, vllm_importance_sampling_mode="token_mask"),
    ):
        launched.clear()
        with monkeypatch.context() as patch, Dispatched(patch) as counter:
            out = grpo_loss(
                logp,
                data["advantages"],
                obj,
                seq_ids=data["seq_ids"],
                mask=data["mask"],
                impl="triton",
                **streams,
            )
            torch.autograd.grad(out.loss, logp, one)
        assert len(launched) == 2 and "aten::new_zeros" in counter.names
        assert len(counter.names) <= 8, counter.names


def test_grpo_loss_kernels_are_registered_ops():
    data = batch((3, 2), seed=10)
    logp = data["logp"].nan_to_num(0.0).requires_grad_()
    ref = torch.zeros(5)
    registered = torch.ops.fastgrpo
    call = checked(
        Tokens(logp, data["advantages"], data["seq_ids"], data["mask"], old_logp=ref, entropy=ref),
        *(Objective("grpo", "sequence", entropy_coef=0.1), None, None, (), 0.0),
    )
    args = kernels._arguments(*call[:4], 0.0, call.names)
    torch.library.opcheck(registered.grpo_loss_triton.default, args)
    entropy = ref.clone().requires_grad_()
    torch.library.opcheck(registered.grpo_loss_triton.default, (logp, entropy, *args[2:]))
    work = torch.ones(4)
    torch.library.opcheck(
        registered.grpo_gradient_triton.default, (ref[0], ref, work, torch.bfloat16)
    )
