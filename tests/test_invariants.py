# SPDX-License-Identifier: Apache-2.0
"""What must hold for any packed row, whatever the model says: isolation, order, bits, zeros."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

BACKENDS = ("dense", "kvgather", "prefix_cpu")
VLMS = ("qwen2_5_vl", "qwen3_vl")


def flat(scores):
    return [[x.detach() for x in s.logp] for s in scores]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", VLMS)
def test_changing_a_completion_changes_no_other(family, backend):
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model)
    before = flat(fg.score(model, groups, backend=backend))
    groups[0].completions[2] = (groups[0].completions[2] + 7) % tm.TEXT_VOCAB
    after = flat(fg.score(model, groups, backend=backend))
    for g, (old, new) in enumerate(zip(before, after, strict=True)):
        for c, (a, b) in enumerate(zip(old, new, strict=True)):
            assert torch.equal(a, b) == ((g, c) != (0, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", VLMS)
def test_changing_a_group_changes_no_other(family, backend):
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model)
    before = flat(fg.score(model, groups, backend=backend))
    groups[1].vision["pixel_values"] = groups[1].vision["pixel_values"] * 2
    groups[3].prompt_ids[4] += 1
    after = flat(fg.score(model, groups, backend=backend))
    for g in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(before[g], after[g], strict=True))
    for g in (1, 3):
        assert not any(torch.equal(a, b) for a, b in zip(before[g], after[g], strict=True))


def test_a_completion_token_depends_on_no_later_token():
    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    before = fg.score(model, groups)[0].logp[2].detach()
    groups[0].completions[2][5] += 1
    after = fg.score(model, groups)[0].logp[2].detach()
    assert torch.equal(before[:5], after[:5]) and not torch.equal(before[5:], after[5:])


def test_first_token_is_predicted_by_the_prompt_alone():
    model = tm.tiny_model("qwen2_5_vl")
    (group,) = tm.synthetic_groups(model, [(((4, 6),), 5, (4, 4, 4))])
    for completion in group.completions:
        completion[0] = 33
    logp = fg.score(model, [group])[0].logp
    assert logp[0][0] == logp[1][0] == logp[2][0]


@pytest.mark.parametrize("family", VLMS)
def test_any_order_and_split_gives_the_same_gradient(family):
    model = tm.tiny_model(family, torch.float64)
    groups = tm.synthetic_groups(model)
    obj = fg.Objective(loss_type="grpo")

    def gradient(groups, **options):
        fg.GRPOStep(model, obj, **options)(groups)
        return tm.take_grads(model)

    with tm.float64_norms():
        want = gradient(groups)
        shuffled = []
        for group in (groups[2], groups[0], groups[3], groups[1]):
            order = torch.arange(len(group.completions)).flip(0)
            shuffled.append(
                fg.Group(
                    group.prompt_ids,
                    [group.completions[i] for i in order],
                    group.vision,
                    advantages=group.advantages[order],
                )
            )
        # every completion its own group, interleaved, as a trainer's shuffle leaves them
        singles = [
            fg.Group(g.prompt_ids, [g.completions[i]], g.vision, advantages=g.advantages[i : i + 1])
            for i in range(4)
            for g in groups
            if i < len(g.completions)
        ]
        for other in (groups, shuffled, singles):
            for options in ({}, {"max_tokens": 60}, {"max_tokens": 41}):
                assert tm.grad_error(gradient(other, **options), want)[0] <= 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", VLMS)
def test_old_and_new_log_probs_are_bitwise_equal(family, backend):
    """Old without gradients, new with checkpointing in train mode: the first ratio is exactly 1."""
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model)
    with torch.no_grad():
        old = flat(fg.score(model, groups, backend=backend))
    model.train()
    tm.checkpoint_activations(model, reentrant=False)
    for row, again in zip(old, flat(fg.score(model, groups, backend=backend)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, again, strict=True))
    for group, row in zip(groups, old, strict=True):
        group.old_logp = row
    metrics = fg.GRPOStep(model, fg.Objective(), backend=backend)(groups)
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0


def test_zero_weight_and_empty_sequences_give_exact_zeros():
    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    obj = fg.Objective(loss_type="dapo", beta=0.1)
    with torch.no_grad():
        for group, row in zip(groups, tm.naive_logp(model, groups), strict=True):
            group.ref_logp = row
    step = fg.GRPOStep(model, obj)
    totals = dict(num_tokens=50, num_sequences=10)
    step(groups[:2], **totals)
    want = tm.take_grads(model)
    empty = torch.zeros(0)
    padded = fg.Group(
        groups[2].prompt_ids,
        [torch.zeros(0, dtype=torch.int64), *groups[2].completions],
        groups[2].vision,
        advantages=torch.tensor([3.0, 1.0, 2.0]),
        ref_logp=[empty, *groups[2].ref_logp],
        mask=[empty, torch.zeros(6), torch.zeros(2)],
    )
    step([*groups[:2], padded], **totals)
    assert tm.grad_error(tm.take_grads(model), want)[0] <= 1e-5
    step([padded], **totals)
    assert all(g is None or not g.any() for g in tm.take_grads(model).values())


def test_scoring_leaves_the_model_as_it_was():
    model = tm.tiny_model("qwen2_5_vl").train()
    groups = tm.synthetic_groups(model)
    inputs = tm.forward_inputs(model, groups[0], groups[0].completions[0])
    plain = model(**inputs).logits.detach()
    deltas = model.model.rope_deltas.clone()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    fg.score(model, groups)  # the first call includes the self-check
    assert torch.equal(torch.rand(3), expected)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(model.model.rope_deltas, deltas)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(**inputs).logits, plain)


def test_generation_is_unchanged():
    model = tm.tiny_model("qwen2_5_vl")
    (group,) = tm.synthetic_groups(model, [(((4, 6),), 5, (3,))])
    inputs = tm.forward_inputs(model, group, torch.zeros(0, dtype=torch.int64))
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = model.generate(**inputs, **options)
    fg.score(model, [group])
    assert torch.equal(model.generate(**inputs, **options), want)
