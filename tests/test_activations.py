# SPDX-License-Identifier: Apache-2.0
"""Under activation checkpointing a packed row recomputes only what the padded step's memory would
not hold, and its gradients are the same bits."""

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import fastgrpo as fg
from fastgrpo.engine import activations
from fastgrpo.engine.activations import Cost, Stack, kept_activations, layers_to_keep
from fastgrpo.engine.forward import feature_store
from fastgrpo.engine.score import pack
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.group import hosted
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine


class Layer(GradientCheckpointingLayer):
    """Leaves its matrix product, of which gelu takes the derivative, for backward."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden):
        return self.down(nn.functional.gelu(self.up(hidden)))


def stack(count, width, units, padded):
    return Stack([Layer(width, 2 * width) for _ in range(count)], units, padded)


def costs_of(*pairs):
    """(a stack, x, a): what each of its layers costs per unit."""
    return {activations._kind(s.layers[0]): Cost(x, a) for s, x, a in pairs}


@pytest.mark.parametrize(
    "padded, kept",
    [
        (10, 0),  # r = 1: the padded step holds 10 (4 * 1 + 5) = 90, and so does the row
        (14, 0),  # 14 * 9 = 126: 36 more, a layer takes 10 (5 - 1) = 40
        (15, 1),  # 45 more
        (20, 2),  # 90 more
        (1000, 4),
    ],
)
def test_as_many_layers_as_the_padded_step_would_hold(padded, kept):
    decoder = stack(4, 2, 10, padded)
    found, _ = layers_to_keep([decoder], costs_of((decoder, 1, 5)), float("inf"))
    assert found == decoder.layers[::-1][:kept]


def test_no_more_than_the_memory_that_is_free():
    decoder = stack(4, 2, 10, 1000)
    found, left = layers_to_keep([decoder], costs_of((decoder, 1, 5)), 125.0)
    assert len(found) == 3 and left == 5.0


def test_what_is_left_is_spare_for_what_goes_on():
    # The row may hold 20 * (4 * 1 + 5) - 10 * (4 * 1 + 5) = 90: two layers take 40 each.
    decoder = stack(4, 2, 10, 20)
    costs = costs_of((decoder, 1, 5))
    found, left = layers_to_keep([decoder], costs, float("inf"))
    assert len(found) == 2 and left == 10.0
    found, left = layers_to_keep([decoder], costs, float("inf"), spare=35.0)
    assert len(found) == 3 and left == 5.0
    assert layers_to_keep([decoder], costs, 30.0, spare=35.0) == ([], 30.0)


def test_the_decoder_keeps_first_and_the_peak_of_both_counts():
    # The padded step: the tower's backward, when the decoder's layers are gone, holds 40 * 2 * 1
    # and one layer's 40 * 9: 440; the decoder's 40 * 2 + 20 * (3 * 1 + 5): 240.
    # The row: 10 * 2 + 10 * 3 * 1 + 10 * 9: 140. Of the 300 between them the decoder's three
    # layers take 3 * 10 * 4, and two of the tower's 2 * 10 * 8.
    tower, decoder = stack(2, 4, 10, 40), stack(3, 2, 10, 20)
    costs = costs_of((tower, 1, 9), (decoder, 1, 5))
    found, _ = layers_to_keep([tower, decoder], costs, float("inf"))
    assert found == [*decoder.layers[::-1], *tower.layers[::-1]]
    less, _ = layers_to_keep([tower, decoder], costs, 250.0)
    assert less == [*decoder.layers[::-1], tower.layers[-1]]


def test_a_kind_of_layer_that_never_ran_is_recomputed():
    decoder = stack(4, 2, 10, 1000)
    assert layers_to_keep([decoder], {}, float("inf"))[0] == []


def test_bytes_are_those_that_the_layer_leaves_for_backward():
    layer, hidden = Layer(8, 24), torch.randn(5, 8, requires_grad=True)
    meter = activations._Measured(layer)
    layer(hidden).sum().backward()
    meter.remove()
    assert meter.given == 5 * 8 * 4  # which a checkpoint holds as well
    assert meter.kept == 2 * 5 * 24 * 4  # before and after gelu
    assert hidden.grad is not None and not layer._forward_hooks


def test_a_layer_without_backward_holds_nothing_either_way():
    layer = Layer(8, 24).requires_grad_(False)
    meter = activations._Measured(layer)
    layer(torch.randn(5, 8))
    assert meter.ran and meter.given == meter.kept == 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "gemma3", "qwen2"])
def test_gradients_are_the_same_bits_and_fewer_layers_run_twice(family):
    model = tm.tiny_model(family).train()
    tm.checkpoint_activations(model, reentrant=False)
    groups = tm.synthetic_groups(model, [([(8, 8)], 40, [3] * 8)])
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    plain, calls = step_of(model, groups, layers, keep=False)
    assert set(calls.values()) == {2}
    for _ in range(2):  # the first step measures, the second goes by it
        grads, calls = step_of(model, groups, layers, keep=True)
        assert all(torch.equal(grads[name], plain[name]) for name in plain)
        assert all(layer.gradient_checkpointing for layer in layers)
    assert set(calls.values()) == {1}  # the padded step has at least 5 times as many tokens


def step_of(model, groups, layers, keep):
    """Gradients of a step, and how often each layer's first part ran."""
    calls = {}

    def count(layer):
        def counted(*_):
            calls[id(layer)] = calls.get(id(layer), 0) + 1

        return next(m for m in layer.modules() if not list(m.children())), counted

    hooks = [part.register_forward_pre_hook(hook) for part, hook in map(count, layers)]
    step = fg.GRPOStep(model, fg.Objective(), keep_activations=keep, self_check=False)
    step(groups)
    for hook in hooks:
        hook.remove()
    return {n: g for n, g in tm.take_grads(model).items() if g is not None}, calls


def first_row(model):
    adapter, groups = Adapter(model), hosted(tm.synthetic_groups(model))
    backend = adapter.prepare(None)
    return adapter, pack(adapter, groups, backend, max_tokens=None, placeholders="refuse")[0]


def untouched(model):
    """Whether every layer of a row's forward is still recomputed."""
    adapter, row = first_row(model)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    before = [layer.gradient_checkpointing for layer in layers]
    with kept_activations(adapter, row, feature_store([row], detach=False)):
        return before == [layer.gradient_checkpointing for layer in layers]


def test_only_layers_of_a_checkpoint_without_reentry_are_kept():
    model = tm.tiny_model("qwen2_5_vl").train()
    assert untouched(model)  # nothing is recomputed
    tm.checkpoint_activations(model, reentrant=True)
    assert untouched(model)
    tm.checkpoint_activations(model, reentrant=False)
    assert not untouched(model)
    with torch.no_grad():
        assert untouched(model)
    assert untouched(model.eval())


def test_weights_in_shards_recompute_every_layer():
    model = tm.tiny_model("qwen2").train()
    tm.checkpoint_activations(model, reentrant=False)
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks it
    assert untouched(model)


def test_a_compiled_layer_is_left_alone():
    model = tm.tiny_model("qwen2").train()
    tm.checkpoint_activations(model, reentrant=False)
    model.model.layers[0].compile()
    assert untouched(model)


def test_a_forward_that_fails_gives_the_layers_back():
    model = tm.tiny_model("qwen2").train()
    tm.checkpoint_activations(model, reentrant=False)
    adapter, row = first_row(model)
    inside = kept_activations(adapter, row, feature_store([row], detach=False))
    with pytest.raises(ZeroDivisionError), inside:
        raise ZeroDivisionError
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_rows_count_what_the_padded_batch_holds():
    model = tm.tiny_model("qwen2_5_vl")
    adapter = Adapter(model)
    groups = hosted(tm.synthetic_groups(model))
    (row,) = pack(adapter, groups, adapter.prepare(None), max_tokens=None, placeholders="refuse")
    lengths = [
        group.prompt_ids.numel() + ids.numel() for group in groups for ids in group.completions
    ]
    assert row.padded_tokens == max(lengths) * sum(1 for g in groups for n in g.lengths if n)
    shown = sum(
        sum(n > 0 for n in group.lengths) * len(row.images.ids_of(group.vision)) for group in groups
    )
    assert len(row.padded_image_ids) == shown > len(row.image_ids)
