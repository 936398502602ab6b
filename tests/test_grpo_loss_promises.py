# SPDX-License-Identifier: Apache-2.0
"""grpo_loss: splits, masks, extremes, extra terms, metrics, refusals."""

import dataclasses
import itertools
import math
import types

import pytest
import torch

import fastgrpo as fg
from fastgrpo.objective import LOSS_TYPES

LENGTHS = (5, 1, 0, 7, 3, 4, 2, 6)
B, N = len(LENGTHS), sum(LENGTHS)
SEQ = torch.repeat_interleave(torch.arange(B), torch.tensor(LENGTHS))
TOKEN_MODE = {"max_completion_length": 9, "vllm_importance_sampling_mode": "token_truncate"}


def inputs(dtype=torch.float64):
    logp = -torch.rand(N, dtype=dtype) * 3
    old = (logp + 0.3 * torch.randn(N, dtype=dtype)).clamp(max=-0.01)
    return {
        "logp": logp,
        "advantages": torch.randn(B, dtype=dtype),
        "old_logp": old,
        "ref_logp": logp + 0.3 * torch.randn(N, dtype=dtype),
        "rollout_logp": old + 0.3 * torch.randn(N, dtype=dtype),
        "entropy": torch.rand(N, dtype=dtype),
        "mask": torch.rand(N) > 0.2,
    }


def call(obj, b, seq_ids=SEQ, **kwargs):
    """(loss, dlogp, result)."""
    b = dict(b) | kwargs
    logp = b.pop("logp").clone().requires_grad_()
    result = fg.grpo_loss(logp, b.pop("advantages"), obj, seq_ids=seq_ids, **b)
    (grad,) = torch.autograd.grad(result.loss, logp)
    return result.loss.detach(), grad, result


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_any_split_into_micro_batches_adds_up(name, per_token):
    b = inputs()
    obj = fg.Objective(name, beta=0.1, entropy_coef=0.02, **TOKEN_MODE)
    if per_token:
        b["advantages"] = torch.randn(N, dtype=torch.float64)
    loss, grad, whole = call(obj, b)
    totals = {"num_tokens": int(b["mask"].sum()), "num_sequences": B}
    for cuts in ((0, 4, 8), (0, 1, 2, 3, 4, 5, 6, 7, 8), (0, 3, 7, 8)):
        parts = []
        for lo, hi in itertools.pairwise(cuts):
            rows = (SEQ >= lo) & (SEQ < hi)
            part = {k: x[rows] for k, x in b.items() if k != "advantages"}
            part["advantages"] = b["advantages"][rows if per_token else slice(lo, hi)]
            parts.append((rows, call(obj, part, SEQ[rows] - lo, **totals)))
        torch.testing.assert_close(sum(p[0] for _, p in parts), loss, rtol=1e-12, atol=1e-14)
        joined = torch.cat([p[1] for _, p in parts])
        torch.testing.assert_close(joined, grad, rtol=1e-12, atol=1e-14)
        if per_token:
            continue
        merged = fg.merge_metrics([p[2] for _, p in parts])
        for key, value in whole.metrics.items():
            torch.testing.assert_close(merged[key], value, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_order_of_sequences_does_not_matter(name):
    b = inputs()
    obj = fg.Objective(name, beta=0.1, **TOKEN_MODE)
    loss, grad, _ = call(obj, b)
    order = torch.tensor([3, 0, 7, 2, 5, 1, 4, 6])
    rows = torch.cat([(SEQ == i).nonzero()[:, 0] for i in order])
    moved = {k: x[order] if k == "advantages" else x[rows] for k, x in b.items()}
    ids = torch.repeat_interleave(torch.arange(B), torch.tensor(LENGTHS)[order])
    loss2, grad2, _ = call(obj, moved, ids)
    torch.testing.assert_close(loss2, loss)
    torch.testing.assert_close(grad2, grad[rows])


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_contribute_exactly_nothing(name, garbage):
    b = inputs()
    obj = fg.Objective(
        name, beta=0.1, entropy_coef=0.1, off_policy_mask_threshold=0.1, **TOKEN_MODE
    )
    loss, grad, whole = call(obj, b)
    for key in ("logp", "old_logp", "ref_logp", "rollout_logp", "entropy"):
        b[key] = b[key].masked_fill(~b["mask"], garbage)
    loss2, grad2, result = call(obj, b)
    assert torch.equal(loss, loss2) and torch.equal(grad, grad2)
    assert (grad2[~b["mask"]] == 0).all()
    for key, value in result.metrics.items():
        assert torch.equal(value, whole.metrics[key]), key


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("ratio", [-1e4, -88.0, -20.0, 20.0, 88.0, 1e4])
def test_extreme_log_ratios_stay_finite(name, level, ratio):
    if level == "sequence" and name not in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"):
        return
    b = inputs(torch.float32)
    obj = fg.Objective(name, level, beta=0.1, **TOKEN_MODE)
    for key, sign in (("old_logp", -1), ("ref_logp", 1), ("rollout_logp", 1)):
        loss, grad, _ = call(obj, b | {key: b["logp"] + sign * ratio})
        assert loss.isfinite() and grad.isfinite().all(), key


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_nothing_to_learn_from(name):
    obj = fg.Objective(name, beta=0.1, entropy_coef=0.1, top_entropy_quantile=0.5, **TOKEN_MODE)
    b = inputs()
    loss, grad, result = call(obj, b | {"mask": torch.zeros(N, dtype=torch.bool)})
    assert loss == 0 and (grad == 0).all()
    assert all(x.isfinite() or x.isnan() for x in result.metrics.values())
    empty = {k: x[:0] for k, x in b.items()}
    for advantages in (b["advantages"], b["advantages"][:0]):
        loss, grad, _ = call(obj, empty | {"advantages": advantages}, SEQ[:0])
        assert loss == 0 and grad.shape == (0,)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo_token", "gmpo", "cispo", "sapo"])
def test_on_policy_ratio_is_exactly_one(name):
    b = inputs(torch.float32)
    obj = fg.Objective(name, **TOKEN_MODE)
    loss, grad, result = call(obj, b | {"old_logp": None})
    same, same_grad, _ = call(obj, b | {"old_logp": b["logp"]})
    assert torch.equal(loss, same) and torch.equal(grad, same_grad)
    assert result.metrics["ratio/min"] == result.metrics["ratio/max"] == 1


def test_no_clip_flag_differs_from_float64():
    """1e5 tokens at least 1e-3 from a clip edge, log-probs from float32."""
    n = 100_000
    old = -torch.rand(n, dtype=torch.float64) * 10
    ratio = torch.rand(n, dtype=torch.float64) + 0.5
    ratio = ratio[((ratio - 0.8).abs() > 1e-3) & ((ratio - 1.2).abs() > 1e-3)]
    old = old[: len(ratio)]
    logp = old + ratio.log()
    A = torch.where(torch.rand(len(ratio)) > 0.5, 1.0, -1.0)
    obj = fg.Objective("dapo")
    ids = torch.arange(len(ratio))
    flags = []
    for dtype in (torch.float64, torch.float32):
        leaf = logp.to(dtype).requires_grad_()
        loss = fg.grpo_loss(leaf, A.to(dtype), obj, seq_ids=ids, old_logp=old.to(dtype)).loss
        (grad,) = torch.autograd.grad(loss, leaf)
        flags.append(grad == 0)
    assert torch.equal(*flags) and flags[0].any() and not flags[0].all()


def test_extra_terms_add_their_formulas():
    b = inputs()
    obj = fg.Objective("dapo", vllm_importance_sampling_correction=False)
    base, base_grad, _ = call(obj, b)
    kept = b["mask"].double() / b["mask"].sum()
    other, within = torch.randn(N, dtype=torch.float64), torch.rand(N) > 0.5
    logp = b["logp"].clone().requires_grad_()
    x = (other - logp).clamp(-2.0, 2.0)
    k3 = (x.exp() - 1 - x).clamp(-1.5, 1.5)
    want = base - 0.02 * (k3 * within * kept).sum() - 0.06 * (logp * kept).sum()
    (want_grad,) = torch.autograd.grad(want, logp)
    term = fg.KLTerm(other, -0.02, "k3", log_ratio_clamp=2.0, value_clamp=1.5, mask=within)
    loss, grad, result = call(obj, b, kl_terms=[term], sampled_entropy_coef=0.06)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grad, base_grad + want_grad)
    torch.testing.assert_close(
        result.metrics["kl_terms/0"], (k3.detach() * within * kept).sum(), rtol=1e-12, atol=0
    )
    weights = torch.rand(N, dtype=torch.float64)
    _, weighted, _ = call(obj, b, token_weights=weights)
    torch.testing.assert_close(weighted, base_grad * weights)


def test_gradient_reaches_a_live_other_stream():
    b = inputs()
    other = torch.randn(N, dtype=torch.float64, requires_grad=True)
    obj = fg.Objective("dapo")
    fg.grpo_loss(
        b["logp"], b["advantages"], obj, seq_ids=SEQ, kl_terms=[fg.KLTerm(other, 0.5, "k2")]
    ).loss.backward()
    torch.testing.assert_close(other.grad, 0.5 * (other.detach() - b["logp"]) / N)


def test_nan_rollout_counts_as_no_correction():
    b = inputs()
    obj = fg.Objective("dapo", off_policy_mask_threshold=0.1, **TOKEN_MODE)
    unknown = b["rollout_logp"].clone()
    unknown[::3] = math.nan
    known = torch.where(unknown.isnan(), b["old_logp"], unknown)
    obj2 = dataclasses.replace(obj, off_policy_mask_threshold=None)
    assert torch.equal(
        call(obj2, b | {"rollout_logp": unknown})[1], call(obj2, b | {"rollout_logp": known})[1]
    )
    assert call(obj, b | {"rollout_logp": unknown})[1].isfinite().all()


def test_gradcheck():
    b = inputs()
    for name in ("dapo", "sapo", "gmpo", "dro"):
        obj = fg.Objective(name, beta=0.1, kl_estimator="k3", **TOKEN_MODE)

        def loss(logp, obj=obj):
            rest = {k: b[k] for k in ("old_logp", "ref_logp", "rollout_logp", "mask")}
            return fg.grpo_loss(logp, b["advantages"], obj, seq_ids=SEQ, **rest).loss

        assert torch.autograd.gradcheck(loss, b["logp"].clone().requires_grad_())


def test_fullgraph():
    b = inputs(torch.float32)
    obj = fg.Objective("dapo", beta=0.1)

    def loss(logp):
        kept = {k: b[k] for k in ("old_logp", "ref_logp", "mask")}
        return fg.grpo_loss(logp, b["advantages"], obj, seq_ids=SEQ, **kept).loss

    logp = b["logp"].requires_grad_()
    (want,) = torch.autograd.grad(loss(logp), logp)
    (got,) = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(logp), logp
    )
    torch.testing.assert_close(got, want)


def test_refusals_name_the_field():
    cases = [
        ("loss_type: 'real'", {"loss_type": "real"}),
        ("loss_type: 'kl_cov'", {"loss_type": "kl_cov"}),
        ("loss_type: expected one of", {"loss_type": "ppo"}),
        ("importance_sampling_level: expected", {"importance_sampling_level": "word"}),
        (
            "importance_sampling_level: 'gmpo'",
            {"loss_type": "gmpo", "importance_sampling_level": "sequence"},
        ),
        ("kl_estimator", {"kl_estimator": "k4"}),
        ("aggregation", {"aggregation": "mean"}),
        ("epsilon: expected", {"epsilon": -0.1}),
        ("epsilon_high: expected", {"epsilon_high": math.nan}),
        ("delta: 'cispo'", {"loss_type": "cispo", "delta": 2.0}),
        ("dual_clip: expected a number > 1", {"dual_clip": 0.5}),
        ("temperature: expected", {"temperature": 0.0}),
        ("top_entropy_quantile: expected", {"top_entropy_quantile": 1.5}),
        ("max_completion_length: 'dr_grpo'", {"loss_type": "dr_grpo"}),
        (
            "vllm_importance_sampling_clip_min",
            {"vllm_importance_sampling_clip_min": 4.0},
        ),
        ("vllm_importance_sampling_mode", {"vllm_importance_sampling_mode": "batch_mask"}),
    ]
    for message, fields in cases:
        with pytest.raises(fg.InputError, match=message):
            fg.Objective(**fields)
    b = inputs()
    obj = fg.Objective()
    calls = [
        ("obj: expected", b, {}, "dapo"),
        ("ref_logp: beta is 0.1", b | {"ref_logp": None}, {}, fg.Objective(beta=0.1)),
        ("entropy: entropy_coef", b | {"entropy": None}, {}, fg.Objective(entropy_coef=0.1)),
        ("old_logp: expected shape", b | {"old_logp": b["old_logp"][1:]}, {}, obj),
        ("mask: expected shape", b | {"mask": b["mask"][1:]}, {}, obj),
        ("advantages: expected", b | {"advantages": b["advantages"][:3]}, {}, obj),
        ("seq_ids: expected non-decreasing ids, row 6", b, {"seq_ids": SEQ.flip(0)}, obj),
        ("seq_ids: expected dtype", b, {"seq_ids": SEQ.int()}, obj),
        ("vllm_importance_sampling_mode: vespo", b, {}, fg.Objective("vespo")),
    ]
    for message, batch, kwargs, objective in calls:
        if message.startswith("seq_ids: expected non"):
            kwargs["seq_ids"] = SEQ.clone()
            kwargs["seq_ids"][6] = 0
        with pytest.raises(fg.InputError, match=message):
            call(objective, batch, **{"seq_ids": SEQ} | kwargs)


def test_from_trl_takes_every_field_it_knows():
    config = types.SimpleNamespace(
        loss_type="cispo", importance_sampling_level="token", epsilon=0.1, epsilon_high=5.0,
        delta=None, beta=0.01, use_bias_correction_kl=False, temperature=0.9, entropy_coef=0.02,
        top_entropy_quantile=0.8, max_completion_length=64, off_policy_mask_threshold=0.2,
        use_vllm=True, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_mask", vllm_importance_sampling_clip_max=2.0,
        vllm_importance_sampling_clip_min=0.5, unrelated="ignored",
    )  # fmt: skip
    obj = fg.Objective.from_trl(config)
    for name, value in vars(config).items():
        if name not in ("use_vllm", "unrelated"):
            assert getattr(obj, name) == value
    config.use_vllm = False
    assert not fg.Objective.from_trl(config).vllm_importance_sampling_correction
    config.use_adaptive_entropy = True
    with pytest.raises(fg.InputError, match="use_adaptive_entropy"):
        fg.Objective.from_trl(config)
