# SPDX-License-Identifier: Apache-2.0
"""grpo_loss against formulas written out sequence by sequence, and against installed TRL."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import fastgrpo as fg
from fastgrpo.objective import LOSS_TYPES

B, LENGTHS = 6, (5, 1, 0, 7, 3, 4)  # ragged, one token, none
N = sum(LENGTHS)
SEQ = torch.repeat_interleave(torch.arange(B), torch.tensor(LENGTHS))
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
MAX_LENGTH = 9


def batch(seed=0, drift=0.3):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logp = -torch.rand(N, generator=g, dtype=torch.float64) * 3
    old = (logp + drift * randn(N)).clamp(max=-0.01)
    rollout = old + drift * randn(N)
    rollout[4] = torch.nan
    return {
        "logp": logp,
        "advantages": randn(B),
        "old_logp": old,
        "ref_logp": logp + drift * randn(N),
        "rollout_logp": rollout,
        "entropy": torch.rand(N, generator=g, dtype=torch.float64),
        "mask": torch.rand(N, generator=g) > 0.2,
    }


def call(obj, b, **kwargs):
    """(loss, dlogp, result)."""
    b = b | kwargs
    logp = b.pop("logp").clone().requires_grad_()
    result = fg.grpo_loss(logp, b.pop("advantages"), obj, seq_ids=b.pop("seq_ids", SEQ), **b)
    (grad,) = torch.autograd.grad(result.loss, logp)
    return result.loss.detach(), grad, result


def oracle(obj, b, logp):
    """The loss from its formulas, one sequence and one token at a time, differentiable."""
    rows = [[t for t in range(N) if SEQ[t] == i and b["mask"][t]] for i in range(B)]
    kept = sorted(t for row in rows for t in row)
    entropies = b["entropy"][kept]
    floor = -math.inf
    if obj.top_entropy_quantile < 1:
        floor = torch.quantile(entropies.float(), 1 - obj.top_entropy_quantile)
    total = 0.0
    for i, row in enumerate(rows):
        if not row:
            continue
        A = b["advantages"][i]
        ks = [logp[t] - b["old_logp"][t] for t in row]
        mean_k = sum(ks) / len(row)
        q = [b["old_logp"][t] - b["rollout_logp"][t] for t in row]
        q = [torch.zeros(()).double() if x.isnan() else x for x in q]
        weights = [rollout_weight(obj, x, q) for x in q]
        drift = [b["rollout_logp"][t] - logp[t].detach() for t in row]
        drift = [0.0 if x.isnan() else x for x in drift]
        threshold = obj.off_policy_mask_threshold
        dropped = threshold is not None and A < 0 and sum(drift) / len(row) > threshold
        acting = [t for t in row if b["entropy"][t] >= floor]
        for j, t in enumerate(row):
            k = mean_k if obj.importance_sampling_level == "sequence" else ks[j]
            r = k.exp()
            value = token_loss(obj, A, r, ks, j, logp[t], b["old_logp"][t], weights, row, acting)
            if obj.loss_type != "vespo":
                value = value * weights[j]
            if dropped or (b["entropy"][t] < floor and obj.loss_type != "gmpo"):
                value = torch.zeros(()).double()
            if obj.beta:
                x = b["ref_logp"][t] - logp[t]
                kl = {"k1": -x, "k2": x * x / 2, "abs": x.abs(), "k3": x.exp() - 1 - x}
                kind = obj.kl_estimator
                kl = kl[kind] if "+" not in kind else kl["k2"] + (kl[kind[:-1]] - kl["k2"]).detach()
                value = value + obj.beta * (kl * r if obj.use_bias_correction_kl else kl)
            scale = {
                "token-mean": 1 / len(kept),
                "token-sum": 1.0,
                "seq-mean-token-sum": 1 / B,
                "seq-mean-token-mean": 1 / B / len(row),
                "seq-mean-token-sum-norm": 1 / B / MAX_LENGTH,
            }[obj.aggregator]
            total = total + scale * value
    acting = [t for t in kept if b["entropy"][t] >= floor]
    return total - obj.entropy_coef * sum(b["entropy"][t] for t in acting) / len(acting)


def rollout_weight(obj, own, all_q):
    level, how = obj.vllm_importance_sampling_mode.split("_")
    q = {"token": own, "sequence": sum(all_q), "geometric": sum(all_q) / len(all_q)}[level]
    w, (low, high) = q.exp(), obj.rollout_bounds
    low, high = 0.0 if low is None else low, math.inf if high is None else high
    if how == "truncate":
        return w.clamp(low, high)
    return w if low <= w <= high else torch.zeros_like(w)


def token_loss(obj, A, r, ks, j, logp, old, weights, row, acting):
    e, eh, name = obj.epsilon, obj.clip_high, obj.loss_type
    if name in CLIPPED or name == "gspo_token":
        if name == "gspo_token":
            mean = (sum(ks) / len(ks)).detach()
            r = mean.clamp(max=10).exp() * (logp - logp.detach()).exp()
        bounded = r if obj.delta is None else r.clamp(max=obj.delta)
        loss = -torch.minimum(bounded * A, r.clamp(1 - e, 1 + eh) * A)
        return torch.minimum(loss, -obj.dual_clip * A) if obj.dual_clip and A < 0 else loss
    if name == "cispo":
        bounded = r.clamp(max=eh) if obj.cispo_clip == "absolute" else r.clamp(1 - e, 1 + eh)
        return -bounded.detach() * A * logp
    if name == "sapo":
        tau = obj.sapo_temperature_pos if A > 0 else obj.sapo_temperature_neg
        return -A * 4 / tau * torch.sigmoid(tau * (r - 1))
    if name == "vespo":
        k, lam = obj.vespo_k_neg, obj.vespo_lambda_neg
        if A >= 0:
            k, lam = obj.vespo_k_pos, obj.vespo_lambda_pos
        logw = sum(x.detach().clamp(-20, 20) for x in ks)
        logw = logw + sum(w.log().clamp(math.log(1e-8), 20) for w in weights)
        logw = logw.clamp(math.log(1e-8), 20)
        return -(lam + k * logw - lam * logw.exp()).exp() * A * logp
    if name == "gmpo":
        clip = (lambda k: k.clamp(max=eh)) if A > 0 else (lambda k: k.clamp(min=-e))
        inner = [clip(k) for k, t in zip(ks, row, strict=True) if t in acting]
        return -A * (sum(inner, torch.zeros(()).double()) / max(len(inner), 1)).exp()
    if name.startswith("dppo"):
        p, po = logp.detach().exp(), old.exp()
        if name == "dppo_tv":
            far = p - po > eh if A > 0 else p - po < -e
        else:
            kl = po * (po / p).log() + (1 - po) * ((1 - po) / (1 - p)).log()
            far = (p > po and kl > eh) if A > 0 else (p < po and kl > e)
        return torch.zeros(()).double() if far else -A * r.detach().clamp(max=20) * logp
    if name == "dro":
        return -(logp * A - obj.dro_beta / 2 * ks[j] ** 2)
    return -logp * A


def objectives():
    """Every loss type with every other choice at least once."""
    mode = "vllm_importance_sampling_mode"
    common = {"max_completion_length": MAX_LENGTH, mode: "token_truncate"}
    for name in LOSS_TYPES:
        yield fg.Objective(name, **common)
        yield fg.Objective(name, beta=0.1, use_bias_correction_kl=False, **common)
        yield fg.Objective(name, beta=0.1, off_policy_mask_threshold=0.05, **common)
        yield fg.Objective(name, top_entropy_quantile=0.4, entropy_coef=0.01, **common)
        how = "token_mask" if name == "vespo" else "geometric_mask"
        bounds = {f"vllm_importance_sampling_clip_{x}": v for x, v in (("max", 1.1), ("min", 0.8))}
        yield fg.Objective(name, **common | bounds | {mode: how})
    for name, (level, kl) in itertools.product(
        (*CLIPPED, "cispo", "sapo"),
        itertools.product(("token", "sequence"), ("k1", "k2", "k3", "abs", "k1+", "k3+")),
    ):
        yield fg.Objective(name, level, beta=0.2, kl_estimator=kl, **common)
    for name, level in itertools.product(CLIPPED, ("token", "sequence")):
        yield fg.Objective(name, level, delta=1.3, epsilon_high=0.28, **common)
        yield fg.Objective(name, level, dual_clip=1.05, epsilon=0.01, **common)
        for how in ("sequence_truncate", "sequence_mask", "geometric_truncate"):
            yield fg.Objective(name, level, **common | {mode: how})
    for how in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"):
        yield fg.Objective("dapo", aggregation=how, **common)
    yield fg.Objective("cispo", cispo_clip="relative", **common)
    yield fg.Objective("cispo", epsilon_high=1.05, **common)


def test_every_objective_equals_its_formulas():
    count = 0
    for i, obj in enumerate(objectives()):
        b = batch(i % 5)
        loss, grad, _ = call(obj, b)
        logp = b["logp"].clone().requires_grad_()
        want = oracle(obj, b, logp)
        (want_grad,) = torch.autograd.grad(want, logp)
        torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-13, msg=str(obj))
        torch.testing.assert_close(grad, want_grad, rtol=1e-11, atol=1e-13, msg=str(obj))
        assert (grad[~b["mask"]] == 0).all()
        count += 1
    assert count > 200


TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def trl_loss(obj, b, config):
    """(loss, dlogp, metrics) of TRL's own `_compute_loss` on the padded batch."""
    GRPOTrainer = pytest.importorskip("trl").GRPOTrainer
    L = max(LENGTHS)
    index = torch.full((B, L), -1)
    for i in range(B):
        index[i, : LENGTHS[i]] = (SEQ == i).nonzero()[:, 0]
    held = index >= 0

    def pad(x, fill=0.0):
        return torch.where(held, x[index.clamp(min=0)], torch.tensor(fill, dtype=x.dtype))

    logp = b["logp"].clone().requires_grad_()
    mask = held & b["mask"][index.clamp(min=0)]
    metrics = {"train": {}, "eval": {}}

    class Metrics(dict):
        def __missing__(self, key):
            self[key] = []
            return self[key]

    metrics["train"] = Metrics()
    accelerator = SimpleNamespace(
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
        num_processes=1,
        sync_gradients=True,
    )
    use_rollout = b.get("rollout_logp") is not None
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (pad(logp), pad(b["entropy"]), None),
        aux_loss_enabled=False,
        top_entropy_quantile=obj.top_entropy_quantile,
        off_policy_mask_threshold=obj.off_policy_mask_threshold,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        importance_sampling_level=obj.importance_sampling_level,
        beta=obj.beta,
        args=config,
        loss_type=obj.loss_type,
        epsilon_low=obj.epsilon,
        epsilon_high=obj.clip_high,
        use_vllm=use_rollout,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        accelerator=accelerator,
        _entropy_bonus_enabled=obj.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=obj.entropy_coef,
        _metrics=metrics,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(B, L, dtype=torch.int64),
        "completion_mask": mask.double(),
        "advantages": b["advantages"],
        "old_per_token_logps": None if b["old_logp"] is None else pad(b["old_logp"]),
        "ref_per_token_logps": pad(b["ref_logp"]),
        "num_items_in_batch": mask.sum(),
    }
    if use_rollout:
        q = inputs["old_per_token_logps"] - pad(b["rollout_logp"])
        q = torch.nan_to_num(q * mask, nan=0.0)
        level, how = obj.vllm_importance_sampling_mode.split("_")
        w = (q.sum(-1, keepdim=True) if level == "sequence" else q).exp()
        low, high = obj.rollout_bounds
        if how == "truncate":
            w = w.clamp(min=low, max=high)
        else:
            w = w.masked_fill((w < (low or -math.inf)) | (w > high), 0.0)
        inputs["importance_sampling_ratio"] = w
        inputs["sampling_per_token_logps"] = pad(b["rollout_logp"])
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (grad,) = torch.autograd.grad(loss, logp)
    return loss.detach(), grad, {k: v[0] for k, v in metrics["train"].items()}


def trl_cases():
    for name, level, beta, correct, delta, opsm, quantile, coef in itertools.product(
        TRL_LOSSES, ("token", "sequence"), (0.0, 0.1), (True, False), (None, 1.3), (None, 0.05),
        (1.0, 0.4), (0.0, 0.02),
    ):  # fmt: skip
        if (delta is not None and name not in CLIPPED) or (not correct and not beta):
            continue
        yield {
            "loss_type": name,
            "importance_sampling_level": level,
            "beta": beta,
            "use_bias_correction_kl": correct,
            "delta": delta,
            "off_policy_mask_threshold": opsm,
            "top_entropy_quantile": quantile,
            "entropy_coef": coef,
            "epsilon_high": 1.2 if name == "cispo" else 0.28,
        }


MODES = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize("mode", MODES)
def test_equals_installed_trl(tmp_path, mode):
    trl = pytest.importorskip("trl")
    base = trl.GRPOConfig(
        output_dir=str(tmp_path), max_completion_length=MAX_LENGTH, bf16=False, report_to=[]
    )
    checked = 0
    # Every importance sampling but none takes another fifth, which leaves out no pair of values.
    fifth = None if mode is None else MODES.index(mode)
    for i, fields in enumerate(trl_cases()):
        if fifth is not None and i % 5 != fifth:
            continue
        sequence_mode = mode is not None and mode.startswith("sequence")
        if fields["loss_type"] == "vespo" and sequence_mode:
            continue
        for name, value in fields.items():
            setattr(base, name, value)
        base.use_vllm = mode is not None
        base.vllm_importance_sampling_mode = mode or "sequence_mask"
        base.vllm_importance_sampling_clip_max = 1.2
        obj = fg.Objective.from_trl(base)
        b = batch(i % 7)
        if mode is None:
            b["rollout_logp"] = None
            if i % 3 == 0:
                b["old_logp"] = None
        # TRL divides 0 by 0 in two metrics, and counts an empty sequence's constant loss.
        want, want_grad, want_metrics = trl_loss(obj, b, base)
        loss, grad, result = call(obj, b)
        # TRL keeps sapo's temperatures in float32.
        error = 1e-6 if fields["loss_type"] == "sapo" else 1e-11
        torch.testing.assert_close(loss, want, rtol=error, atol=error, msg=str(fields))
        torch.testing.assert_close(grad, want_grad, rtol=error, atol=error, msg=str(fields))
        for name, value in want_metrics.items():
            if name not in ("entropy_coef", "policy_loss", "vespo/phi_seq_mean"):
                ours = float(result.metrics[name])
                assert ours == pytest.approx(value, rel=1e-6, abs=1e-9), (name, fields)
        checked += 1
    assert checked > 100
