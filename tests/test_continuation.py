# SPDX-License-Identifier: Apache-2.0
"""The first loss after a rollout goes on from its prompts: the plain loss and gradients, once."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo.engine.continuation import ContinuedRow, KeptPrompts
from fastgrpo.engine.loss import RowLoss, loss_of_groups
from fastgrpo.engine.score import pack
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.group import hosted
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

# two images and none; prompts of 9 tokens and of one; the image of another prompt
SPECS = (([(4, 6), (4, 4)], 5, []), ([], 9, []), ([], 1, []), ([(4, 6)], 3, []))
CORE = ("gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3", "qwen3_vl", "smolvlm")
EVERY = [pytest.param(f, marks=() if f in CORE else pytest.mark.slow) for f in tm.FAMILIES]
LOSS = RowLoss(fg.Objective(beta=0.1))


@pytest.fixture
def exact():
    with tm.float64_norms():
        yield


def rollout(model, *, keep_activations=False, generations=3):
    """Groups sampled from the model with all that a loss asks of them, and what was kept."""
    prompts = tm.synthetic_groups(model, SPECS)
    kept = KeptPrompts(Adapter(model), keep_activations=keep_activations)
    given = dict(max_new_tokens=6, seed=0, eos_token_id=(3, 7, 11), keep=kept)
    groups = fg.generate(model, prompts, generations, **given)
    for i, group in enumerate(groups):
        group.advantages = torch.linspace(-1.0, 1.5, generations) + i
        group.ref_logp = [logp - 0.1 for logp in group.rollout_logp]
    return groups, kept


def loss_of(model, groups, prompts=None, **options):
    """The loss, its gradients, and the tokens that the decoder ran."""
    tokens = []
    embedding = Adapter(model).core.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    totals = {"num_tokens": 50.0, "num_sequences": 12.0}
    step = loss_of_groups(LOSS, Adapter(model), groups, prompts=prompts, **totals, **options)
    hook.remove()
    return step, sum(tokens)


def lengths(groups):
    return sum(sum(group.lengths) for group in groups)


def same(model, continued, plain):
    """Of two losses, each (StepLoss, its groups), the values and all gradients."""
    grads = []
    for step in (continued, plain):
        step.loss.backward()
        grads.append(tm.take_grads(model))
    torch.testing.assert_close(continued.loss, plain.loss, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(continued.scores, plain.scores, strict=True):
        for a, b in zip(ours.logp, theirs.logp, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    error, name = tm.grad_error(*grads)
    assert error < 1e-9, name


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", EVERY)
def test_the_loss_and_its_gradients_are_the_plain_ones(family):
    model = tm.tiny_model(family, torch.float64).train()
    if not KeptPrompts.serves(Adapter(model)):
        assert Adapter(model).mixers  # recurrent layers alone are not served
        return
    groups, kept = rollout(model)
    continued, tokens = loss_of(model, groups, kept)
    assert tokens == lengths(groups)
    plain, _ = loss_of(model, groups)
    same(model, continued, plain)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("backend", ["prefix_cpu", "kvgather", "dense"])
def test_every_backend_goes_on_from_the_prompts(backend):
    model = tm.tiny_model("qwen2", torch.float64).train()
    groups, kept = rollout(model)
    same(
        model,
        loss_of(model, groups, kept, backend=backend)[0],
        loss_of(model, groups, backend=backend)[0],
    )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_layers_that_are_computed_again_in_backward(family, keep):
    model = tm.tiny_model(family, torch.float64).train()
    tm.checkpoint_activations(model, reentrant=False)
    for _ in range(2):  # the first measures, the second goes by it
        groups, kept = rollout(model, keep_activations=keep)
        continued, tokens = loss_of(model, groups, kept)
        assert tokens == lengths(groups)
        same(model, continued, loss_of(model, groups)[0])


@pytest.mark.usefixtures("exact")
def test_rows_of_one_loss_share_a_graph():
    model = tm.tiny_model("qwen2_5_vl", torch.float64).train()
    groups, kept = rollout(model)
    continued, tokens = loss_of(model, groups, kept, max_tokens=40)
    assert len(continued.results) > 2 and tokens == lengths(groups)
    same(model, continued, loss_of(model, groups)[0])


def test_a_loss_of_some_prompts_leaves_none_for_others():
    model = tm.tiny_model("qwen2_5_vl").train()
    groups, kept = rollout(model)
    assert loss_of(model, groups[2:], kept)[1] == lengths(groups[2:])
    assert loss_of(model, groups[:2], kept)[1] > lengths(groups[:2])


def test_a_graph_is_used_once_with_gradient_and_as_often_as_one_likes_without():
    model = tm.tiny_model("qwen2").train()
    groups, kept = rollout(model)
    with torch.no_grad():
        for _ in range(2):
            assert loss_of(model, groups, kept)[1] == lengths(groups)
    assert loss_of(model, groups, kept)[1] == lengths(groups)
    assert loss_of(model, groups, kept)[1] > lengths(groups)


def test_other_weights_and_other_prompts_are_computed():
    model = tm.tiny_model("qwen2_5_vl").train()
    groups, kept = rollout(model)
    pixels = {**groups[0].vision, "pixel_values": groups[0].vision["pixel_values"] + 1.0}
    other = [groups[0].with_vision(pixels), *groups[1:]]
    with torch.no_grad():
        assert loss_of(model, groups, kept)[1] == lengths(groups)
        assert loss_of(model, other, kept)[1] > lengths(groups)
        model.lm_head.weight[0, 0] += 1.0
        assert loss_of(model, groups, kept)[1] > lengths(groups)


def test_a_completion_with_images_of_its_own_needs_its_prompt():
    model = tm.tiny_model("qwen2_5_vl").train()
    groups, kept = rollout(model)
    shown = tm.synthetic_groups(model, [([(4, 4)], 3, [])])[0]
    groups[0].completions[1] = shown.prompt_ids
    groups[0].completion_vision = [{}, shown.vision, {}]
    groups[0].ref_logp[1] = torch.zeros(shown.prompt_ids.numel())
    backend = Adapter(model).prepare(None)
    options = dict(max_tokens=None, placeholders="neutralize")
    for some, goes_on in ((groups, False), (groups[1:], True)):
        for group in some:
            group.rollout_logp = None
        rows = kept.continued(pack(Adapter(model), hosted(some), backend, **options))
        assert [isinstance(row, ContinuedRow) for row in rows] == [goes_on] * len(rows)
        kept = rollout(model)[1]


def test_what_a_forward_cannot_leave_is_not_kept():
    model = tm.tiny_model("qwen2_5_vl").train()
    serves = KeptPrompts.serves
    assert serves(Adapter(model))
    tm.checkpoint_activations(model, reentrant=False)
    assert serves(Adapter(model))
    tm.checkpoint_activations(model, reentrant=True)
    assert not serves(Adapter(model))  # its forward has no graph
    assert not serves(Adapter(tm.tiny_model("qwen2")))  # eval mode
    assert not serves(Adapter(tm.tiny_model("qwen3_5").train()))  # states beside keys and values
    compiled = tm.tiny_model("qwen2").train()
    compiled.model.layers[0].compile()
    assert not serves(Adapter(compiled))


def test_a_rollout_leaves_the_model_in_train_mode_and_samples_the_same():
    model = tm.tiny_model("qwen2_5_vl").train()
    groups, _ = rollout(model)
    assert all(module.training for module in model.modules())
    prompts = [fg.Group(group.prompt_ids, [], group.vision) for group in groups]
    again = fg.generate(model, prompts, 3, max_new_tokens=6, seed=0, eos_token_id=(3, 7, 11))
    for ours, theirs in zip(groups, again, strict=True):
        assert all(map(torch.equal, ours.completions, theirs.completions))
        assert all(map(torch.equal, ours.rollout_logp, theirs.rollout_logp))
        assert not any(logp.requires_grad for logp in ours.rollout_logp)
