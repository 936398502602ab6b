# SPDX-License-Identifier: Apache-2.0
"""linear_grpo_loss = linear_logprob + grpo_loss = float64, for the whole matrix of objectives.

N rows, D hidden, V vocabulary, B sequences.
"""

import itertools
import types

import pytest
import torch

import fastgrpo as fg
from fastgrpo.losses.tokens import Tokens
from fastgrpo.objective import LOSS_TYPES
from fastgrpo.ops.grpo_loss import checked
from fastgrpo.ops.linear import one_pass
from fastgrpo.ops.linear.one_pass import linear_grpo_op, pack
from fastgrpo.ops.select import why_not
from fastgrpo.testing import assert_within_budget, relative_error

FAST = [i for i in ("torch", "cpp") if why_not("linear_grpo_loss", i, torch.device("cpu")) is None]
LENGTHS = (5, 1, 0, 7, 3, 4, 2, 6)
B, N, D, V = len(LENGTHS), sum(LENGTHS), 8, 23
SEQ = torch.repeat_interleave(torch.arange(B), torch.tensor(LENGTHS))
STREAMS = ("mask", "old_logp", "ref_logp", "rollout_logp")


def batch(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    b = {"hidden": randn(N, D), "weight": randn(V, D), "bias": randn(V)}
    b["targets"] = torch.randint(0, V, (N,), generator=g)
    b["targets"][9] = -100
    logp = fg.linear_logprob(b["hidden"], b["weight"], b["targets"], bias=b["bias"]).logp
    b["old_logp"] = (logp + 0.3 * randn(N)).clamp(max=-0.01)
    b["ref_logp"], b["rollout_logp"] = logp + 0.3 * randn(N), b["old_logp"] + 0.3 * randn(N)
    b["advantages"], b["mask"] = randn(B), torch.rand(N, generator=g) > 0.2
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in b.items()}


def call(obj, b, impl, need=(True, True, True), **kwargs):
    """(loss, log-probs, gradients that were wanted, result)."""
    names = ("hidden", "weight", "bias")
    leaves = [b[k].clone().requires_grad_(n) for k, n in zip(names, need, strict=True)]
    h, w, bias = leaves
    streams = {k: b.get(k) for k in STREAMS}
    kwargs = {"seq_ids": SEQ, "bias": bias, "impl": impl} | streams | kwargs
    result = fg.linear_grpo_loss(h, w, b["targets"], b["advantages"], obj, **kwargs)
    grads = torch.autograd.grad(1.7 * result.loss, [x for x in leaves if x.requires_grad])
    return result.loss.detach(), result.logp, list(grads), result


def matrix(stride):
    """Every `stride`-th of loss x level x KL x importance sampling x clip x what couples tokens,
    each valid once; a stride prime to every factor samples the 12,000 evenly, and 7 and 19 leave
    no pair of values out."""
    kls = ((0.0, "k3", True), (0.1, "k3", True), (0.1, "k3", False), (0.1, "k1", False))
    kls += ((0.1, "k2+", True),)
    modes = (None, "token_truncate", "token_mask", "sequence_mask", "geometric_truncate")
    clips = ({}, {"delta": 1.3}, {"dual_clip": 1.05}, {"epsilon_high": 0.5})
    others = (
        {},
        {"entropy_coef": 0.05},
        {"top_entropy_quantile": 0.4},
        {"off_policy_mask_threshold": 0.1},
    )
    wheel = 0
    for name, level in itertools.product(LOSS_TYPES, ("token", "sequence")):
        for kl, mode, clip, other in itertools.product(kls, modes, clips, others):
            wheel += 1
            if wheel % stride:
                continue
            fields = {"beta": kl[0], "kl_estimator": kl[1], "use_bias_correction_kl": kl[2]}
            fields |= clip | other | {"vllm_importance_sampling_mode": mode or "token_mask"}
            try:
                obj = fg.Objective(name, level, max_completion_length=9, **fields)
            except fg.InputError:
                continue
            if name == "vespo" and mode and not mode.startswith("token"):
                continue
            yield obj, mode is not None


@pytest.mark.parametrize("stride", [19, pytest.param(7, marks=pytest.mark.slow)])
def test_the_matrix(stride):
    plain, count = batch(), 0
    for i, (obj, rollout) in enumerate(matrix(stride)):
        b = dict(plain) if rollout else plain | {"rollout_logp": None}
        per_token = torch.randn(N, dtype=torch.float64)
        kwargs = {"num_tokens": 40.0, "num_sequences": 9} if i % 2 else {}
        if i % 3 == 0:
            b["advantages"] = per_token
        want = call(obj, b, "reference", **kwargs)
        # One chunk, or chunks of three rows: shorter than most sequences.
        workspace = (None, 3 * V * 8 / 2**20)[i % 2]
        got = call(obj, b, "torch", workspace_mb=workspace, **kwargs)
        assert relative_error(got[0], want[0]) < 1e-12, obj
        for a, e in zip((got[1], *got[2]), (want[1], *want[2]), strict=True):
            assert relative_error(a, e) < 1e-11, obj
        for name, value in want[3].metrics.items():
            torch.testing.assert_close(got[3].metrics[name], value, equal_nan=True, msg=name)
        count += 1
    assert count > 5600 // stride


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(
    "name,level", [("dapo", "token"), ("grpo", "sequence"), ("vespo", "token")]
)
def test_error_budget_float32(impl, name, level):
    obj = fg.Objective(name, level, beta=0.1, vllm_importance_sampling_mode="token_truncate")
    exact = call(obj, batch(), "reference")
    b = batch(torch.float32)
    same, ours = call(obj, b, "reference"), call(obj, b, impl)
    names = ("loss", "logp", "dhidden", "dweight", "dbias")
    for what, a, e, s in zip(
        names,
        (ours[0], ours[1], *ours[2]),
        (exact[0], exact[1], *exact[2]),
        (same[0], same[1], *same[2]),
        strict=True,
    ):
        assert_within_budget(a, e, s, factor=3.0, what=f"{impl} {what}")


@pytest.mark.parametrize("impl", FAST)
def test_bfloat16_accuracy_gates(impl):
    """Issue: log-prob error <= 2e-4, dX <= 2.5e-3, dW <= 3e-3 relative, from bf16 inputs."""
    b, n, d, v = {}, 256, 256, 4096
    b["hidden"], b["weight"] = torch.randn(n, d), torch.randn(v, d) * (3 / d**0.5)
    b = {k: x.bfloat16() for k, x in b.items()}
    b["bias"] = torch.zeros(v, dtype=torch.bfloat16)
    b["targets"], b["advantages"] = torch.randint(0, v, (n,)), torch.randn(8)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in b.items()}
    ids, obj = torch.arange(n) // 32, fg.Objective("dapo")
    ours = call(obj, b, impl, seq_ids=ids)
    exact = call(obj, wide, "reference", seq_ids=ids)
    assert (ours[1] - exact[1]).abs().max() <= 2e-4
    assert relative_error(ours[2][0], exact[2][0]) <= 2.5e-3
    assert relative_error(ours[2][1], exact[2][1]) <= 3e-3


@pytest.mark.parametrize("need", list(itertools.product((True, False), repeat=3))[:-1])
def test_only_the_gradients_that_are_wanted(need):
    obj, b = fg.Objective("grpo", beta=0.1), batch()
    want, got = call(obj, b, "reference", need), call(obj, b, "torch", need)
    for a, e in zip(got[2], want[2], strict=True):
        assert relative_error(a, e) < 1e-12


def test_no_grad_makes_only_the_loss():
    obj, b = fg.Objective("grpo", beta=0.1), batch()
    with torch.no_grad():
        result = fg.linear_grpo_loss(
            b["hidden"].requires_grad_(), b["weight"], b["targets"], b["advantages"], obj,
            seq_ids=SEQ, bias=b["bias"], **{k: b[k] for k in STREAMS},
        )  # fmt: skip
    assert result.plan == "forward" and not result.loss.requires_grad
    torch.testing.assert_close(result.loss, call(obj, b, "reference")[0])


@pytest.mark.parametrize("name", ["dapo", "gmpo"])
def test_micro_batches_add_up(name):
    obj, b = fg.Objective(name, beta=0.1), batch()
    b["rollout_logp"] = None
    whole = call(obj, b, "torch")
    totals = {"num_tokens": (b["mask"] & (b["targets"] != -100)).sum(), "num_sequences": B}
    total, grads = 0.0, None
    for lo, hi in ((0, 3), (3, 5), (5, 8)):
        rows = (SEQ >= lo) & (SEQ < hi)
        part = dict(b) | {"advantages": b["advantages"][lo:hi]}
        part |= {k: b[k][rows] for k in ("hidden", "targets", "mask", "old_logp", "ref_logp")}
        loss, _, g, _ = call(obj, part, "torch", seq_ids=SEQ[rows] - lo, **totals)
        total = total + loss
        grads = [g] if grads is None else [*grads, g]
    torch.testing.assert_close(total, whole[0])
    torch.testing.assert_close(torch.cat([g[0] for g in grads]), whole[2][0])
    torch.testing.assert_close(sum(g[1] for g in grads), whole[2][1])


@pytest.mark.parametrize("impl", FAST)
def test_log_probs_and_first_ratio_equal_those_of_linear_logprob(impl):
    b = batch(torch.float32)
    obj = fg.Objective("dapo")
    with torch.no_grad():
        head = (b["hidden"], b["weight"], b["targets"])
        old = fg.linear_logprob(*head, bias=b["bias"], impl=impl).logp
    kept = b["targets"] != -100
    result = call(obj, b | {"old_logp": old, "mask": None, "rollout_logp": None}, impl)[3]
    assert torch.equal(result.logp[kept], old[kept])
    assert result.metrics["ratio/min"] == result.metrics["ratio/max"] == 1


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_entropies_are_those_of_linear_logprob_where_a_token_counts(impl):
    b = batch(torch.float32)
    head = (b["hidden"], b["weight"].requires_grad_(), b["targets"])
    expected = fg.linear_logprob(*head, bias=b["bias"], outputs=("logp", "entropy")).entropy
    into = {"dweight_into": torch.zeros_like(b["weight"])} if impl != "reference" else {}
    for options in ({"with_entropy": True}, {"with_entropy": True, **into}, {}):
        options = {"bias": b["bias"], "seq_ids": SEQ, "impl": impl} | options
        result = fg.linear_grpo_loss(*head, b["advantages"], fg.Objective("dapo"), **options)
        if "with_entropy" not in options:
            assert result.entropy is None
            continue
        assert not result.entropy.requires_grad
        counted = b["targets"] != -100
        torch.testing.assert_close(result.entropy[counted], expected[counted].detach())
        assert not result.entropy[~counted].any()


def test_per_token_temperature_softcap_and_scale():
    b, T = batch(), torch.rand(N, dtype=torch.float64) + 0.5
    kwargs = {"temperature": T, "softcap": 4.0, "logit_scale": 0.6}
    obj = fg.Objective("dapo", entropy_coef=0.1)
    want, got = (call(obj, b, impl, **kwargs) for impl in ("reference", "torch"))
    for a, e in zip((got[0], *got[2]), (want[0], *want[2]), strict=True):
        assert relative_error(a, e) < 1e-12


@pytest.mark.parametrize("late", [False, True])  # a GPU looks for overflow after the last chunk
def test_overflowing_rows_and_their_neighbours(late, monkeypatch):
    if late:
        monkeypatch.setattr(one_pass, "looks_at_each_chunk", lambda device: False)
    b = batch(torch.float32)
    b["hidden"][3] *= 400.0  # exponents far beyond 76
    b["hidden"][20] *= 90.0
    b |= {k: None for k in ("ref_logp", "rollout_logp", "old_logp")}
    wide = {k: x if k in ("targets", "mask") or x is None else x.double() for k, x in b.items()}
    for name in ("dapo", "gspo_token"):
        obj = fg.Objective(name, entropy_coef=0.1)
        want, got = call(obj, wide, "reference"), call(obj, b, None)
        for a, e in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
            assert relative_error(a, e) < 1e-4


@pytest.mark.parametrize("name", ["dapo", "gmpo"])
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1, "top_entropy_quantile": 0.4}])
@pytest.mark.parametrize("need", [(False, True, False), (True, True, True)])
def test_kept_exponentials_give_the_gradients_in_backward(name, options, need):
    b = batch()
    obj = fg.Objective(name, beta=0.1, vllm_importance_sampling_mode="token_mask", **options)
    for softcap in (None, 4.0):
        want = call(obj, b, "reference", need=need, softcap=softcap)
        got = call(obj, b, "torch", need=need, softcap=softcap, workspace_mb=1.0)
        assert got[3].plan == "keep"
        torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
        for ours, exact in zip(got[2], want[2], strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-13)


def test_chunk_and_keeping_follow_the_memory(monkeypatch):
    from fastgrpo.ops.linear import memory

    gpu = torch.device("cuda", 0)
    total = types.SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    for free, rows, kept in (
        (60, 4096, True),
        (9, 4096, False),
        (4, 2048, False),
        (0.1, 512, False),
    ):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: int(free * 1e9))
        assert memory.chunk_rows(151936, 16384, 4, None, gpu) == rows
        assert memory.keeps(16384, 151936, 2, None, gpu) == kept
    assert not memory.keeps(2 * 16384, 151936, 2, None, gpu)
    assert memory.keeps(1024, 1024, 4, 4.0, gpu) and not memory.keeps(1024, 1024, 4, 3.9, gpu)


def test_dweight_into_accumulates_in_place():
    obj, b = fg.Objective("dapo"), batch(torch.float32)
    want = call(obj, b, "torch")[2]
    into = torch.ones(V, D)
    leaves = [b[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    streams = {k: b[k] for k in STREAMS}
    result = fg.linear_grpo_loss(
        leaves[0], leaves[1], b["targets"], b["advantages"], obj,
        seq_ids=SEQ, bias=leaves[2], dweight_into=into, dweight_scale=1.7, impl="torch", **streams,
    )  # fmt: skip
    (1.7 * result.loss).backward()
    assert leaves[1].grad is None
    torch.testing.assert_close(into - 1.0, want[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(leaves[0].grad, want[0])
    torch.testing.assert_close(leaves[2].grad, want[2])


@pytest.mark.parametrize("impl", FAST)
def test_empty_and_all_masked(impl):
    obj = fg.Objective("grpo", beta=0.1, entropy_coef=0.1)
    b = batch(torch.float32)
    loss, logp, grads, _ = call(obj, b | {"mask": torch.zeros(N, dtype=torch.bool)}, impl)
    assert loss == 0 and all((x == 0).all() for x in (logp, *grads))
    shared = ("weight", "bias", "advantages")
    empty = {k: x if k in shared else x[:0] for k, x in b.items()}
    loss, logp, grads, _ = call(obj, empty, impl, seq_ids=SEQ[:0])
    assert loss == 0 and logp.shape == (0,) and all((x == 0).all() for x in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    b, blank = batch(dtype), torch.empty(N)
    streams = (b["mask"], b["old_logp"], b["ref_logp"], b["rollout_logp"])
    t = Tokens(blank, b["advantages"], SEQ, *streams, entropy=blank)
    terms = [fg.KLTerm(b["ref_logp"], 0.1, mask=b["mask"]), fg.KLTerm(b["old_logp"], -0.1)]
    call = checked(t, fg.Objective("grpo", beta=0.1), None, None, terms, 0.0, b["targets"])
    call = call.per_token()
    columns, spec = pack(call)
    args = (
        b["hidden"].requires_grad_(), b["weight"].requires_grad_(), b["bias"].requires_grad_(),
        b["targets"], torch.full((N,), 0.8), None, 1.0, "torch", None, "",
        columns, call.num_rows, spec, [True, True, True],
    )  # fmt: skip
    torch.library.opcheck(linear_grpo_op, args)


def test_fullgraph():
    b, obj = batch(torch.float32), fg.Objective("grpo", beta=0.1)
    h, w = b["hidden"].requires_grad_(), b["weight"].requires_grad_()
    streams = {k: b[k] for k in ("old_logp", "ref_logp", "mask")}

    def loss(h, w):
        head = (h, w, b["targets"], b["advantages"], obj)
        return fg.linear_grpo_loss(*head, seq_ids=SEQ, **streams).loss

    want = torch.autograd.grad(loss(h, w), (h, w))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(h, w), (h, w)), want, strict=True):
        assert torch.equal(a, e)


def test_refusals():
    b, obj = batch(torch.float32), fg.Objective("dapo")
    live = fg.KLTerm(b["ref_logp"].clone().requires_grad_(), 0.1)
    cases = [
        (r"kl_terms\[0\].other_logp: expected a constant", {"kl_terms": [live]}),
        ("dweight_into: expected shape", {"dweight_into": torch.zeros(V, D + 1)}),
        ("dweight_into: impl", {"dweight_into": torch.zeros(V, D), "impl": "reference"}),
        ("token_weights: expected shape", {"token_weights": torch.ones(3)}),
        ("impl: linear_grpo_loss", {"impl": "cuda"}),
        ("temperature: expected shape", {"temperature": torch.ones(3)}),
    ]
    for message, kwargs in cases:
        with pytest.raises(fg.InputError, match=message):
            call(obj, b, kwargs.pop("impl", "torch"), **kwargs)


@pytest.mark.parametrize("name", ["dapo", "gmpo"])
@pytest.mark.parametrize("entropy,softcap", [(0.0, None), (0.1, None), (0.1, 4.0)])
def test_bfloat16_route_of_a_gpu(monkeypatch, name, entropy, softcap):
    """The CUDA route on CPU: bf16 matmuls emulated, E in bf16 over its logits."""
    from fastgrpo.ops.linear import grpo, head, logprob

    def mm_wide(a, b, out=None, add=False):
        assert a.dtype == b.dtype == torch.bfloat16
        product = a.float() @ b.float()
        return product if out is None else out.add_(product) if add else out.copy_(product)

    b = batch(torch.bfloat16)
    kwargs = {"softcap": softcap, "num_tokens": 3.0}
    fields = {"entropy_coef": entropy, "vllm_importance_sampling_mode": "token_mask"}
    obj = fg.Objective(name, beta=0.1, **fields)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in b.items()}
    want = call(obj, wide, "reference", **kwargs)
    b |= {k: wide[k].float() for k in ("old_logp", "ref_logp", "rollout_logp", "advantages")}
    logp = fg.linear_logprob(b["hidden"], b["weight"], b["targets"]).logp
    for module in (grpo, head, logprob):
        monkeypatch.setattr(module, "bfloat16_products", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(head, "mm_wide", mm_wide)
    for workspace, plan in ((4 * V * 4 / 2**20, "one_pass"), (1.0, "keep")):
        got = call(obj, b, "torch", workspace_mb=workspace, **kwargs)
        assert got[3].plan == plan and (got[1] - want[1]).abs().max() <= 2e-4
        for a, e in zip(got[2], want[2], strict=True):
            assert relative_error(a, e) < 8e-3  # a few bf16 roundings of few terms
    for outputs, workspace in ((("logp",), None), (("logp", "entropy"), None), (("logp",), 1e-9)):
        leaves = [b[k].clone().requires_grad_() for k in ("hidden", "weight")]
        options = {"outputs": outputs, "workspace_mb": workspace, "impl": "torch"}
        out = fg.linear_logprob(*leaves, b["targets"], **options)
        torch.testing.assert_close(out.logp, logp, atol=2e-4, rtol=0)
        total = out.logp.sum() + (out.entropy.sum() if "entropy" in outputs else 0.0)
        exact = [wide[k].clone().requires_grad_() for k in ("hidden", "weight")]
        ref = fg.linear_logprob(*exact, b["targets"], outputs=outputs, impl="reference")
        ref_total = ref.logp.sum() + (ref.entropy.sum() if "entropy" in outputs else 0.0)
        grads = torch.autograd.grad(total, leaves), torch.autograd.grad(ref_total, exact)
        for a, e in zip(*grads, strict=True):
            assert relative_error(a, e) < 8e-3
