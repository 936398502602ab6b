# SPDX-License-Identifier: Apache-2.0
"""GRPOStep adds the gradients of the whole GRPO loss of one-at-a-time forwards, for any split."""

import dataclasses

import pytest
import torch

import fastgrpo as fg
from fastgrpo.engine import loss as engine_loss
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine
DEFAULTS = ({},)  # one run without options


def off_policy(model, groups, seed=2, reference=True, rollout=False):
    """Old, reference and rollout log-probs near the model's own."""
    generator = torch.Generator().manual_seed(seed)

    def near(row):
        return [x + 0.2 * torch.randn(x.shape, generator=generator).to(x) for x in row]

    with torch.no_grad():
        for group, row in zip(groups, tm.naive_logp(model, groups), strict=True):
            group.old_logp = near(row)
            group.ref_logp = near(row) if reference else None
            group.rollout_logp = near(group.old_logp) if rollout else None
    return groups


def flat(groups, name):
    values = [getattr(group, name) for group in groups]
    return None if values[0] is None else torch.cat([x for row in values for x in row])


def plain_step(model, groups, obj, entropy=False):
    """The loss of all groups at once from plain forwards; its result and gradients."""
    logp = [x for row in tm.naive_logp(model, groups, obj.temperature) for x in row]
    lengths = torch.tensor([len(x) for x in logp])
    per_sequence = isinstance(groups[0].advantages, torch.Tensor)
    advantages = (
        torch.cat([g.advantages for g in groups]) if per_sequence else flat(groups, "advantages")
    )
    entropies = None
    if entropy:
        rows = [
            tm.naive_logits(model, g, c) / obj.temperature for g in groups for c in g.completions
        ]
        entropies = torch.distributions.Categorical(logits=torch.cat(rows)).entropy()
    result = fg.grpo_loss(
        torch.cat(logp),
        advantages,
        obj,
        seq_ids=torch.repeat_interleave(lengths),
        mask=flat(groups, "mask"),
        old_logp=flat(groups, "old_logp"),
        ref_logp=flat(groups, "ref_logp"),
        rollout_logp=flat(groups, "rollout_logp"),
        entropy=entropies,
    )
    result.loss.backward()
    return result, tm.take_grads(model)


def assert_step_is_plain(model, groups, obj, limit=1e-10, entropy=False, runs=DEFAULTS):
    """A step with each of the options `runs`; the metrics of the last."""
    want, want_grads = plain_step(model, groups, obj, entropy)
    for options in runs:
        metrics = fg.GRPOStep(model, obj, **options)(groups)
        error, where = tm.grad_error(tm.take_grads(model), want_grads)
        assert error <= limit, (options, where)
        loss = float(want.loss.detach())
        assert metrics.pop("loss") == pytest.approx(loss, rel=limit, abs=limit), options
        for name, value in metrics.items():
            known = float(want.metrics[name])
            assert value == pytest.approx(known, rel=limit, abs=limit, nan_ok=True), (options, name)
    return metrics


def case(family="qwen2_5_vl", **kwargs):
    model = tm.tiny_model(family, torch.float64)
    return model, off_policy(model, tm.synthetic_groups(model), **kwargs)


SPLIT = {"max_tokens": 41}  # several rows, and groups divided between them
OBJECTIVES = [
    dict(loss_type="grpo"),
    dict(loss_type="dapo", beta=0.1),
    dict(loss_type="bnpo", epsilon_high=0.3),
    dict(loss_type="dr_grpo", max_completion_length=12, beta=0.05, kl_estimator="k2"),
    dict(loss_type="cispo", epsilon_high=2.0),
    dict(loss_type="sapo", beta=0.1),
    dict(loss_type="luspo"),
    dict(loss_type="vespo"),
    dict(loss_type="gmpo"),
    dict(loss_type="grpo", importance_sampling_level="sequence", beta=0.1),
    dict(loss_type="dapo", temperature=0.8, delta=1.5),
]


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
def test_step_float64_equals_plain(options):
    with tm.float64_norms():
        model, groups = case()
        runs = ({"max_tokens": None}, SPLIT)
        assert_step_is_plain(model, groups, fg.Objective(**options), runs=runs)


@pytest.mark.parametrize("family", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llama"))
def test_step_float32(family):
    model = tm.tiny_model(family)
    groups = off_policy(model, tm.synthetic_groups(model))
    obj = fg.Objective(loss_type="grpo", beta=0.1)
    backends = ("dense", "kvgather", "prefix_cpu")
    runs = [{"backend": backend, "max_tokens": 60} for backend in backends]
    assert_step_is_plain(model, groups, obj, 2e-5, runs=runs)


def test_step_on_policy_and_rollout_weights():
    with tm.float64_norms():
        model, groups = case(reference=False, rollout=True)
        assert_step_is_plain(model, groups, fg.Objective(loss_type="dapo"), runs=[SPLIT])
        for group in groups:
            group.rollout_logp = group.old_logp = None
        metrics = assert_step_is_plain(model, groups, fg.Objective(loss_type="dapo"))
        assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0


def test_step_entropy_bonus():
    with tm.float64_norms():
        model, groups = case()
        obj = fg.Objective(loss_type="dapo", entropy_coef=0.05)
        assert_step_is_plain(model, groups, obj, entropy=True, runs=[SPLIT])


def test_step_top_entropy_needs_one_row():
    with tm.float64_norms():
        model, groups = case()
        obj = fg.Objective(loss_type="dapo", top_entropy_quantile=0.5)  # between two of 46 tokens
        assert_step_is_plain(model, groups, obj, entropy=True)
        with pytest.raises(fg.InputError, match="raise max_tokens"):
            fg.GRPOStep(model, obj, max_tokens=41)(groups)


def test_step_masks_and_per_token_advantages():
    with tm.float64_norms():
        model, groups = case()
        generator = torch.Generator().manual_seed(4)
        for group in groups:
            group.mask = [torch.rand(n, generator=generator) > 0.3 for n in group.lengths]
            group.advantages = [
                torch.randn(n, generator=generator, dtype=torch.float64) for n in group.lengths
            ]
        groups[1].mask = [torch.zeros_like(m) for m in groups[1].mask]
        for loss_type in ("grpo", "dapo"):
            obj = fg.Objective(loss_type=loss_type, beta=0.1)
            assert_step_is_plain(model, groups, obj, runs=[SPLIT])


@pytest.mark.parametrize("loss_type", ("grpo", "dapo", "cispo", "vespo", "gmpo", "sapo"))
@pytest.mark.parametrize("old", (True, False))
def test_skip_zero_gradient_changes_nothing(loss_type, old):
    with tm.float64_norms():
        model, groups = case(reference=False, rollout=old)
        for group in groups:
            group.old_logp = group.old_logp if old else None
        groups[0].advantages[1:3] = 0.0
        groups[3].advantages.zero_()
        mode = "token_truncate"
        obj = fg.Objective(loss_type=loss_type, vllm_importance_sampling_mode=mode)
        tokens = []
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        )
        outcomes = []
        for skip in (True, False):
            tokens.clear()
            step = fg.GRPOStep(model, obj, skip_zero_gradient=skip, self_check=False)
            metrics = step(groups)
            outcomes.append((metrics, tm.take_grads(model), sum(tokens)))
        (metrics, grads, few), (metrics_off, grads_off, all_tokens) = outcomes
        dropped = 3 + 9 + groups[3].prompt_ids.numel() + 13
        assert all_tokens - few == (0 if loss_type == "vespo" else dropped)
        assert metrics == pytest.approx(metrics_off, rel=1e-12, abs=1e-12, nan_ok=True)
        assert tm.grad_error(grads, grads_off)[0] <= 1e-11
        unknown = old and loss_type != "vespo"  # the ratio of a skipped sequence is not known
        assert ("ratio/min" in metrics) == (not unknown)
        assert_step_is_plain(model, groups, obj)


def test_nothing_to_learn_is_a_zero_step():
    model = tm.tiny_model("qwen2")
    groups = tm.synthetic_groups(model)
    for group in groups:
        group.advantages.zero_()
    metrics = fg.GRPOStep(model, fg.Objective())(groups)
    assert metrics["loss"] == 0.0
    assert all(g is None or not g.any() for g in tm.take_grads(model).values())


def test_all_masked_step_is_finite_and_zero():
    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    for group in groups:
        group.mask = [torch.zeros(n) for n in group.lengths]
    for loss_type in ("grpo", "dapo", "vespo"):
        metrics = fg.GRPOStep(model, fg.Objective(loss_type=loss_type))(groups)
        assert metrics["loss"] == 0.0
        assert all(g is None or not g.any() for g in tm.take_grads(model).values())


def test_reference_model_and_disabled_adapters():
    """beta != 0 and no ref_logp: the same gradient as when the log-probs are given."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(base)
    with torch.no_grad():
        ref_logp = tm.naive_logp(base, groups)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    policy = peft.get_peft_model(tm.tiny_model("qwen2_5_vl"), config)
    obj = fg.Objective(loss_type="grpo", beta=0.2)
    outcomes = []
    patches = []
    policy.get_base_model().model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(len(args[0])), with_kwargs=True
    )
    for how in ("given", "disabled", "model"):
        if how == "given":
            given = [
                dataclasses.replace(g, ref_logp=r) for g, r in zip(groups, ref_logp, strict=True)
            ]
        patches.clear()
        step = fg.GRPOStep(
            policy,
            obj,
            ref_model=base if how == "model" else None,
            max_tokens=60,
            self_check=False,
        )
        metrics = step(given if how == "given" else groups)
        outcomes.append((metrics, tm.take_grads(policy)))
        assert sum(patches) == 24 + 64 + 16 + 60  # frozen tower: once, for both passes
    for metrics, grads in outcomes[1:]:
        assert metrics == pytest.approx(outcomes[0][0], rel=1e-4, abs=1e-6)
        assert tm.grad_error(grads, outcomes[0][1])[0] <= 2e-4
    assert metrics["kl"] > 0


def test_an_adapted_projector_after_a_frozen_tower_learns():
    """The reference pass leaves no features of the disabled adapter for the policy pass."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = tm.tiny_model("llava")
    groups = tm.synthetic_groups(base)
    with torch.no_grad():
        ref_logp = tm.naive_logp(base, groups)
    config = peft.LoraConfig(r=4, target_modules=["linear_1"], init_lora_weights=False)
    policy = peft.get_peft_model(base, config)
    step = fg.GRPOStep(policy, fg.Objective(loss_type="grpo", beta=0.2))
    metrics, grads = step(groups), tm.take_grads(policy)
    given = [dataclasses.replace(g, ref_logp=r) for g, r in zip(groups, ref_logp, strict=True)]
    assert metrics == pytest.approx(step(given), rel=1e-4, abs=1e-6)
    assert tm.grad_error(grads, tm.take_grads(policy))[0] <= 2e-4
    assert all(g.any() for name, g in grads.items() if "lora_" in name)


def test_split_group_runs_a_trainable_tower_once():
    model = tm.tiny_model("qwen3_vl", torch.float64)
    groups = tm.synthetic_groups(model, [(((8, 8),), 3, (6, 5, 4, 7, 3))])
    patches = []
    model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(len(args[0])), with_kwargs=True
    )
    with tm.float64_norms():
        obj = fg.Objective(loss_type="grpo")
        want, want_grads = plain_step(model, groups, obj)
        patches.clear()
        fg.GRPOStep(model, obj, max_tokens=36, self_check=False)(groups)
    assert patches == [64]
    assert tm.grad_error(tm.take_grads(model), want_grads)[0] <= 1e-10


def test_gradients_accumulate_and_shares_of_a_step_add_up():
    """Two ranks' shares with the denominators of the whole give the gradient of the whole."""
    with tm.float64_norms():
        model, groups = case()
        obj = fg.Objective(loss_type="dapo", beta=0.1)
        step = fg.GRPOStep(model, obj)
        step(groups)
        want = tm.take_grads(model)
        totals = dict(
            num_tokens=sum(sum(g.lengths) for g in groups),
            num_sequences=sum(len(g.lengths) for g in groups),
        )
        step(groups[:1], **totals)
        step(groups[1:], **totals)
        assert tm.grad_error(tm.take_grads(model), want)[0] <= 1e-11


def test_the_head_gradient_is_added_in_place_from_the_second_row_on(monkeypatch):
    """Where autograd would do nothing else with it: not past a hook, not where only the head is
    trained (its loss would have no graph)."""
    given = []

    def spied(*args, dweight_into=None, **kwargs):
        given.append(dweight_into)
        extra = {} if dweight_into is None else {"dweight_into": dweight_into}
        return fg.linear_grpo_loss(*args, **extra, **kwargs)

    monkeypatch.setattr(engine_loss, "linear_grpo_loss", spied)
    model, groups = case()
    head = model.get_output_embeddings().weight
    obj = fg.Objective("dapo", beta=0.04)

    def placed(**options):
        given.clear()
        with tm.float64_norms():
            want, want_grads = plain_step(model, groups, obj)
            step = fg.GRPOStep(model, obj, max_tokens=41, self_check=False, **options)
            metrics = step(groups, weight=-1.5)
        scaled = {n: None if g is None else -1.5 * g for n, g in want_grads.items()}
        error, where = tm.grad_error(tm.take_grads(model), scaled)
        assert error <= 1e-11, where
        assert metrics["loss"] == pytest.approx(-1.5 * float(want.loss.detach()), rel=1e-10)
        assert len(given) > 2
        return [into is not None for into in given]

    assert placed() == [False] + [True] * (len(given) - 1)
    assert not any(placed(impl="reference")) and not any(placed(workspace_mb=1.0))
    hook = head.register_post_accumulate_grad_hook(lambda weight: None)
    assert not any(placed())
    hook.remove()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is head)
    assert not any(placed())


@pytest.mark.parametrize("reentrant", (True, False))
def test_step_with_gradient_checkpointing(reentrant):
    model = tm.tiny_model("qwen3_vl").train()
    groups = off_policy(model, tm.synthetic_groups(model))
    obj = fg.Objective(loss_type="grpo", beta=0.1)
    want, want_grads = plain_step(model, groups, obj)
    tm.checkpoint_activations(model, reentrant=reentrant)
    model.enable_input_require_grads()
    fg.GRPOStep(model, obj, max_tokens=41)(groups)
    assert tm.grad_error(tm.take_grads(model), want_grads)[0] <= 2e-5


def test_step_refusals():
    model = tm.tiny_model("qwen2")
    groups = tm.synthetic_groups(model)
    with pytest.raises(fg.InputError, match="Objective"):
        fg.GRPOStep(model, "grpo")
    step = fg.GRPOStep(model, fg.Objective(beta=0.1))
    with pytest.raises(fg.InputError, match="ref_model"):
        step(groups)
    with pytest.raises(fg.InputError, match="groups is empty"):
        step([])
    groups[1].old_logp = [torch.zeros(n) for n in groups[1].lengths]
    with pytest.raises(fg.InputError, match=r"old_logp is given in 1 of 4 .*groups\[0\]"):
        fg.GRPOStep(model, fg.Objective())(groups)
    groups[1].old_logp = groups[2].advantages = None
    with pytest.raises(fg.InputError, match=r"groups\[2\].*advantages is missing"):
        fg.GRPOStep(model, fg.Objective())(groups)
