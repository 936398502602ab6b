# SPDX-License-Identifier: Apache-2.0
"""What the packed row cannot express is refused with the reason; the self-check finds the rest."""

import types

import pytest
import torch
from torch import nn

import fastgrpo as fg
from fastgrpo.engine import SelfCheckError, self_check
from fastgrpo.models import Adapter
from fastgrpo.models.head import effective_head
from fastgrpo.models.registry import family_of
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine


def config(model_type="qwen2", **fields):
    return types.SimpleNamespace(model_type=model_type, text_config=None, **fields)


@pytest.mark.parametrize("kind", ("linear_attention", "conv", "mamba2", "recurrent"))
def test_hybrid_layers(kind):
    """Qwen3.5, LFM2 and their like: a mask cannot express a state that runs through the tokens."""
    with pytest.raises(fg.InputError, match=f"{kind!r} layers, which a packed row does not"):
        family_of(config("qwen3", layer_types=["full_attention", kind]))


@pytest.mark.parametrize("model_type", ("gemma2", "qwen4_exp", "gpt2"))
def test_families_not_on_the_list(model_type):
    with pytest.raises(fg.InputError, match=f"'{model_type}' is not served.*; .*qwen2_5_vl"):
        family_of(config(model_type))


def test_a_text_model_that_is_refused_says_why():
    paligemma_2 = config("paligemma")
    paligemma_2.text_config = config("gemma2")
    with pytest.raises(
        fg.InputError, match="text model of gemma, not 'gemma2': its attention caps"
    ):
        family_of(paligemma_2)


def test_unknown_layer_kind():
    with pytest.raises(fg.InputError, match="'chunked_attention' layers"):
        family_of(config("llama", layer_types=["full_attention", "chunked_attention"]))


@pytest.mark.parametrize("kind", ("dynamic", "longrope"))
def test_rope_that_depends_on_the_longest_sequence(kind):
    with pytest.raises(fg.InputError, match=f"rope type '{kind}' rescales"):
        family_of(config("llama", rope_parameters={"rope_type": kind}))


def test_attention_dropout_in_train_mode_only():
    model = tm.tiny_model("qwen2_5_vl", text={"attention_dropout": 0.2})
    groups = tm.synthetic_groups(model)
    fg.score(model, groups)
    with pytest.raises(fg.InputError, match=r"dropout 0.2 in model.language_model.* to 0"):
        fg.score(model.train(), groups)


def test_models_of_another_kind():
    with pytest.raises(fg.InputError, match="must be a transformers model, .* got Linear"):
        fg.score(nn.Linear(2, 2), [])
    base = tm.tiny_model("qwen2").model
    with pytest.raises(fg.InputError, match="Qwen2Model has no lm_head"):
        fg.score(base, [])


def test_heads_that_cannot_be_read():
    class Quantized(nn.Module):
        weight = torch.zeros(4, 4, dtype=torch.uint8)

    with pytest.raises(fg.InputError, match=r"Quantized with torch.uint8 \(4, 4\)"):
        effective_head(Quantized())
    shard = nn.Linear(4, 4)
    shard.weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(fg.InputError, match="ZeRO-3 shard"):
        effective_head(shard)
    with pytest.raises(fg.InputError, match="Identity with no weight"):
        effective_head(nn.Identity())


def test_wrappers_are_seen_through():
    model = tm.tiny_model("qwen2")

    class Wrapper(nn.Module):  # as DDP and DeepSpeed look
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **kwargs):
            self.calls += 1
            return self.module(**kwargs)

    wrapped = Wrapper(model)
    groups = tm.synthetic_groups(model)
    got = fg.score(wrapped, groups, self_check=False)
    assert wrapped.calls == 1  # hooks of the wrapper see the call
    assert torch.equal(got[0].logp[0], fg.score(model, groups)[0].logp[0])


def test_head_is_restored_after_an_error(monkeypatch):
    model = tm.tiny_model("qwen2")
    groups = tm.synthetic_groups(model)
    before = fg.score(model, groups)[0].logp[0].detach()
    with monkeypatch.context() as patch:
        patch.setattr("fastgrpo.engine.forward.effective_head", lambda head: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fg.score(model, groups)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(fg.score(model, groups)[0].logp[0], before)


# ---------------------------------------------------------------- the self-check


def tampered(model, monkeypatch):
    """A model whose positions are read differently in a packed row: nothing we could refuse."""
    real = type(model).forward

    def forward(self, position_ids=None, **kwargs):
        if position_ids is not None:
            position_ids = position_ids * 2
        return real(self, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forward.__get__(model))


@pytest.mark.parametrize("family", ("qwen2_5_vl", "llama"))
def test_self_check_stops_a_model_that_disagrees(monkeypatch, family):
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model)
    tampered(model, monkeypatch)
    with pytest.raises(SelfCheckError, match=r"differ from the plain forward: max .* nats"):
        fg.score(model, groups)
    with pytest.raises(SelfCheckError):
        fg.GRPOStep(model, fg.Objective())(groups)
    assert fg.score(model, groups, self_check=False)


def test_self_check_runs_once_per_model_and_backend():
    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))

    def forwards(**options):
        calls.clear()
        fg.score(model, groups, **options)
        return len(calls)

    # One packed row and two plain sequences, without gradients and then with them.
    with torch.no_grad():
        assert forwards() == 4
        assert forwards() == 1
    assert forwards() == 7
    assert forwards() == 1
    assert forwards(backend="dense") == 7
    assert forwards(backend="dense") == 1
    other = tm.tiny_model("qwen2_5_vl")
    assert other not in self_check._checked


@pytest.mark.parametrize("module", ("model.language_model.layers.1", "model.visual"))
def test_self_check_stops_a_gradient_that_is_cut_in_the_packed_row_only(module):
    model = tm.tiny_model("qwen2_5_vl")
    inside = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: inside.append(kwargs.get("fg_layout") is not None),
        with_kwargs=True,
    )

    def cut(m, args, output):
        if not inside[-1]:
            return output
        if isinstance(output, torch.Tensor):
            return output.detach()
        for name, value in output.items():
            if isinstance(value, torch.Tensor):
                output[name] = value.detach()
        return output

    model.get_submodule(module).register_forward_hook(cut)
    groups = tm.synthetic_groups(model)
    before = [p.grad for p in model.parameters()]
    with torch.no_grad():
        fg.score(model, groups)  # log-probs alone do not tell
    with pytest.raises(SelfCheckError, match="does not arrive through the packed row"):
        fg.GRPOStep(model, fg.Objective())(groups)
    assert [p.grad for p in model.parameters()] == before


def test_self_check_stops_a_gradient_that_differs():
    model = tm.tiny_model("llama")

    def scaled(module, args, kwargs, output):
        if kwargs.get("fg_layout") is None:
            return output
        return output.detach() + 1.5 * (output - output.detach())

    model.model.layers[1].register_forward_hook(scaled, with_kwargs=True)
    with pytest.raises(SelfCheckError, match="differs from the plain one by 0.5 of its norm"):
        fg.GRPOStep(model, fg.Objective())(tm.synthetic_groups(model))


def test_self_check_leaves_gradients_as_they_were():
    model = tm.tiny_model("qwen3_vl")
    kept = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = kept[name]
    fg.score(model, tm.synthetic_groups(model))
    assert all(p.grad is kept[name] for name, p in model.named_parameters())
    assert all((grad == 3.0).all() for grad in kept.values())


def test_adapters_that_nothing_would_train_are_named():
    """Reentrant checkpointing cuts the graph of an adapter whose inputs need no gradient."""
    from peft import LoraConfig, get_peft_model

    model = tm.tiny_model("qwen3_vl")
    groups = tm.synthetic_groups(model)
    lora = LoraConfig(r=4, target_modules=["qkv", "q_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).train()
    model.enable_input_require_grads()
    tm.checkpoint_activations(model, reentrant=True)
    with pytest.raises(fg.InputError, match=r"get none: .*visual.*and \d+ more.*use_reentrant"):
        fg.GRPOStep(model, fg.Objective())(groups)


def test_a_parameter_that_nothing_uses_is_named_once(caplog):
    model = tm.tiny_model("qwen2")
    model.unused = torch.nn.Parameter(torch.zeros(3))
    step = fg.GRPOStep(model, fg.Objective())
    for _ in range(2):
        step(tm.synthetic_groups(model))
    assert caplog.text.count("require a gradient and get none: unused") == 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_text_batch_asks_no_gradient_of_what_only_images_reach(family, caplog):
    model = tm.tiny_model(family)
    fg.GRPOStep(model, fg.Objective())(tm.synthetic_groups(model, [((), 5, [4, 2])]))
    assert "get none" not in caplog.text


def test_self_check_with_nothing_to_score():
    model = tm.tiny_model("qwen2")
    empty = fg.Group(torch.tensor([1, 2]), [torch.zeros(0, dtype=torch.int64)])
    assert fg.score(model, [empty])[0].logp[0].numel() == 0
    assert Adapter(model).core not in self_check._checked or not self_check._checked[model]
