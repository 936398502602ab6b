# SPDX-License-Identifier: Apache-2.0
"""GRPOStep's further terms: KL streams, token weights, sums of objectives, perturbed images."""

import dataclasses

import pytest
import torch

import fastgrpo as fg
from fastgrpo import advantages as fa
from fastgrpo.errors import InputError
from fastgrpo.testing import models as tm

OBJ = fg.Objective(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, dual_clip=3.0)


@pytest.fixture(autouse=True)
def _norms():
    """The stock norms compute in float32; here they keep float64, so that equality can be."""
    with tm.float64_norms():
        yield


def near(row, generator, scale=0.2):
    return [x + scale * torch.randn(x.shape, generator=generator).to(x) for x in row]


def case(family="qwen2_5_vl"):
    model = tm.tiny_model(family, torch.float64)
    groups = tm.synthetic_groups(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group, row in zip(groups, tm.naive_logp(model, groups), strict=True):
            group.old_logp = near(row, generator)
            group.streams = {
                "perturbed": near(row, generator, 0.5),
                "rollout": near(row, generator),
            }
            group.token_weights = [
                torch.randint(0, 2, x.shape, generator=generator).to(x) for x in row
            ]
    return model, groups


def joined(groups, name):
    rows = [getattr(g, name) if name in vars(g) else g.streams[name] for g in groups]
    return torch.cat([x for row in rows for x in row])


def plain(model, groups, obj, **terms):
    logp = [x for row in tm.naive_logp(model, groups) for x in row]
    seq_ids = torch.repeat_interleave(torch.tensor([len(x) for x in logp]))
    advantages = torch.cat([g.advantages for g in groups])
    result = fg.grpo_loss(
        torch.cat(logp), advantages, obj, seq_ids=seq_ids, old_logp=joined(groups, "old_logp"),
        **terms,
    )  # fmt: skip
    result.loss.backward()
    return result.loss.item(), tm.take_grads(model)


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_streams_weights_and_sampled_entropy_equal_the_plain_loss(max_tokens):
    model, groups = case()
    streams = {
        "perturbed": fg.KLStream(-0.02, "k3", value_clamp=10.0),
        "rollout": fg.KLStream(0.1, "k1", log_ratio_clamp=0.3),
    }
    terms = [s.term(joined(groups, name)) for name, s in streams.items()]
    want, want_grads = plain(
        model, groups, OBJ, kl_terms=terms, sampled_entropy_coef=0.06,
        token_weights=joined(groups, "token_weights"),
    )  # fmt: skip
    step = fg.GRPOStep(
        model, OBJ, kl_streams=streams, sampled_entropy_coef=0.06, max_tokens=max_tokens
    )
    metrics = step(groups)
    error, where = tm.grad_error(tm.take_grads(model), want_grads)
    assert error <= 1e-10, where
    assert metrics["loss"] == pytest.approx(want, rel=1e-10)


def test_zero_advantage_completions_keep_their_stream_gradient():
    model, groups = case()
    for group in groups:
        group.advantages = torch.zeros_like(group.advantages)
    fg.GRPOStep(model, OBJ, kl_streams={"perturbed": fg.KLStream(1.0)})(groups)
    grads = tm.take_grads(model)
    assert any(g is not None and g.abs().max() > 0 for g in grads.values())


def test_two_calls_with_weights_add_their_objectives():
    model, groups = case()
    for group in groups:
        group.token_weights = None
    first, second = groups[:2], groups[2:]
    loss_a, grads_a = plain(model, first, OBJ)
    loss_b, grads_b = plain(model, second, OBJ)
    step = fg.GRPOStep(model, OBJ)
    total = step(first)["loss"] + step(second, weight=0.1)["loss"]
    assert total == pytest.approx(loss_a + 0.1 * loss_b, rel=1e-10)
    want = {
        name: (0 if a is None else a) + 0.1 * (0 if grads_b[name] is None else grads_b[name])
        for name, a in grads_a.items()
    }
    want = {n: g for n, g in want.items() if torch.is_tensor(g)}
    got = {n: g for n, g in tm.take_grads(model).items() if n in want}
    error, where = tm.grad_error(got, want)
    assert error <= 1e-10, where


def test_a_perturbed_image_reuses_the_layout():
    model = tm.tiny_model("qwen2_5_vl")
    group = tm.synthetic_groups(model, [([(4, 6)], 5, [7, 3])])[0]
    grey = group.with_vision(group.vision | {"pixel_values": group.vision["pixel_values"] * 0.0})
    (seen,), (blind,) = fg.score(model, [group]), fg.score(model, [grey])
    plain_blind = tm.naive_logp(model, [grey])[0]
    for got, want in zip(blind.logp, plain_blind, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert (seen.logp[0] - blind.logp[0]).abs().max() > 1e-3
    with pytest.raises(InputError, match="shapes"):
        group.with_vision({k: v[:4] for k, v in group.vision.items()})


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_vppo_step_does_not_depend_on_the_rows(max_tokens):
    """The whole VPPO recipe on the engine: statistics of the mini-batch, any micro-batch."""
    model, groups = case()
    generator = torch.Generator().manual_seed(1)
    old = [x for g in groups for x in g.old_logp]
    seq_ids = torch.repeat_interleave(torch.tensor([len(x) for x in old]))
    perturbed = torch.cat(old) + torch.randn(len(seq_ids), generator=generator).double()
    dependency = fa.visual_dependency(torch.cat(old), perturbed)
    mask = fa.top_share_mask(dependency, seq_ids, 0.4).double()
    weights = fa.trajectory_weights(fa.sequence_mean(dependency, seq_ids, len(old)))
    sizes = [len(g.completions) for g in groups]
    masks = iter(mask.split([len(x) for x in old]))
    for group, weight in zip(groups, weights.split(sizes), strict=True):
        group.advantages = group.advantages * weight
        group.token_weights = [next(masks) for _ in group.completions]
    want, want_grads = plain(model, groups, OBJ, token_weights=mask, sampled_entropy_coef=0.06)
    step = fg.GRPOStep(model, OBJ, sampled_entropy_coef=0.06, max_tokens=max_tokens)
    metrics = step(groups)
    error, where = tm.grad_error(tm.take_grads(model), want_grads)
    assert error <= 1e-10 and metrics["loss"] == pytest.approx(want, rel=1e-10), where


def test_missing_streams_and_wrong_lengths_are_named():
    model, groups = case()
    with pytest.raises(InputError, match="no 'other'"):
        fg.GRPOStep(model, OBJ, kl_streams={"other": fg.KLStream(1.0)})(groups)
    with pytest.raises(InputError, match=r"streams\['x'\]\[0\]"):
        dataclasses.replace(groups[0], streams={"x": [torch.zeros(1)] * len(groups[0].completions)})
    with pytest.raises(InputError, match="token_weights"):
        dataclasses.replace(groups[0], token_weights=[torch.zeros(1)])
