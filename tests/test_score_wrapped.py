# SPDX-License-Identifier: Apache-2.0
"""fg.score through PEFT and FSDP2 wrappers, and with images shared between prompts and rows."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine


def naive_and_packed(model, groups, **options):
    weights = tm.random_weights(groups)
    want = tm.naive_logp(model, groups)
    tm.weighted_sum(want, weights).backward()
    want_grads = tm.take_grads(model)
    got = [s.logp for s in fg.score(model, groups, **options)]
    tm.weighted_sum(got, weights).backward()
    return want, want_grads, got, tm.take_grads(model)


def assert_same(want, want_grads, got, got_grads, limit=2e-5):
    for a, b in zip(sum(map(list, got), []), sum(map(list, want), []), strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=0)
    error, where = tm.grad_error(got_grads, want_grads)
    assert error <= limit, where


def lora(model, **config):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **config)
    )
    return wrapped


@pytest.mark.parametrize(
    "targets",
    (["q_proj", "v_proj"], ["q_proj", "lm_head"], ["qkv", "down_proj", "lm_head"]),
)
@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl"))
def test_lora(family, targets):
    model = lora(tm.tiny_model(family), target_modules=targets)
    groups = tm.synthetic_groups(model.get_base_model())
    want, want_grads, got, got_grads = naive_and_packed(model, groups)
    assert_same(want, want_grads, got, got_grads)
    if "lm_head" in targets:
        head = [g for n, g in got_grads.items() if "lm_head.lora_B" in n]
        assert head and all(float(g.abs().max()) > 0 for g in head)


def test_lora_two_adapters_and_disabled():
    model = lora(tm.tiny_model("qwen2"), target_modules=["q_proj", "lm_head"])
    groups = tm.synthetic_groups(model.get_base_model())
    with torch.no_grad():
        base = tm.naive_logp(model.get_base_model(), groups)
        adapted = [s.logp for s in fg.score(model, groups)]
        with model.disable_adapter():
            off = [s.logp for s in fg.score(model, groups)]
            want = tm.naive_logp(model, groups)
    assert float((adapted[0][0] - off[0][0]).abs().max()) > 1e-3
    assert float((base[0][0] - adapted[0][0]).abs().max()) < 1e-4  # PEFT injects into the base
    for a, b in zip(off, want, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=2e-5, rtol=0)


def test_lora_trained_copy_of_the_head():
    model = lora(tm.tiny_model("qwen2"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    groups = tm.synthetic_groups(model.get_base_model())
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert_same(*naive_and_packed(model, groups))


def test_lora_dropout_is_refused_in_train_mode_only():
    model = lora(tm.tiny_model("qwen2"), target_modules=["q_proj"], lora_dropout=0.1).train()
    groups = tm.synthetic_groups(model.get_base_model())
    with pytest.raises(fg.InputError, match="dropout 0.1"):
        fg.score(model, groups)
    assert_same(*naive_and_packed(model.eval(), groups))


def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tm.tiny_model("qwen2"), config)
    with pytest.raises(fg.InputError, match="virtual tokens"):
        fg.score(model, tm.synthetic_groups(tm.tiny_model("qwen2")))


def test_dora_head_is_refused():
    model = lora(tm.tiny_model("qwen2"), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(fg.InputError, match="LoRA variant"):
        fg.score(model, tm.synthetic_groups(model.get_base_model()))


@pytest.fixture
def process_group(tmp_path):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch.distributed is not built in")
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "llama"))
def test_fsdp2_one_process(process_group, family):
    from torch.distributed.fsdp import fully_shard

    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model)
    weights = tm.random_weights(groups)
    want = tm.naive_logp(model, groups)
    tm.weighted_sum(want, weights).backward()
    want_grads = tm.take_grads(model)
    layers = getattr(model.model, "language_model", model.model).layers
    blocks = list(model.model.visual.blocks) if hasattr(model.model, "visual") else []
    for block in [*layers, *blocks]:
        fully_shard(block)
    fully_shard(model)
    got = [s.logp for s in fg.score(model, groups)]
    tm.weighted_sum(got, weights).backward()
    got_grads = {
        n: g.full_tensor() if hasattr(g, "full_tensor") else g
        for n, g in tm.take_grads(model).items()
    }
    assert_same(want, want_grads, got, got_grads)


def count_patches(model):
    seen = []
    model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("family", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
def test_each_distinct_image_is_encoded_once(family):
    """Two prompts ask about one image, a third has it next to another; one has the other alone."""
    model = tm.tiny_model(family)
    a, b = tm.synthetic_groups(model, [(((4, 6),), 5, (3, 2)), (((8, 4),), 4, (4,))])
    again = fg.Group(a.prompt_ids.flip(0), [torch.tensor([5, 6])], dict(a.vision))
    both = fg.Group(
        torch.cat([a.prompt_ids, b.prompt_ids]),
        [torch.tensor([7, 8, 9])],
        {k: torch.cat([a.vision[k], b.vision[k]]) for k in a.vision},
    )
    groups = [a, b, again, both]
    for max_tokens in (None, 50):
        want = tm.naive_logp(model, groups)
        tm.weighted_sum(want, tm.random_weights(groups)).backward()
        want_grads = tm.take_grads(model)
        seen = count_patches(model)
        got = [s.logp for s in fg.score(model, groups, max_tokens=max_tokens, self_check=False)]
        assert sum(seen) == 24 + 32
        tm.weighted_sum(got, tm.random_weights(groups)).backward()
        assert_same(want, want_grads, got, tm.take_grads(model))
    assert "get_image_features" not in vars(model.model)


def test_images_that_differ_in_one_pixel_are_not_merged():
    model = tm.tiny_model("qwen2_5_vl")
    (a,) = tm.synthetic_groups(model, [(((4, 6),), 5, (3,))])
    pixels = a.vision["pixel_values"].clone()
    pixels[0, 0], pixels[0, 1] = pixels[0, 1].clone(), pixels[0, 0].clone()  # the same sum
    b = fg.Group(a.prompt_ids, a.completions, a.vision | {"pixel_values": pixels})
    got = fg.score(model, [a, b])
    want = tm.naive_logp(model, [a, b])
    assert (want[0][0] - want[1][0]).abs().max().item() > 1e-4
    torch.testing.assert_close(got[1].logp[0], want[1][0], atol=2e-5, rtol=0)


def test_groups_with_the_same_prompt_share_it():
    model = tm.tiny_model("qwen2_5_vl")
    (group,) = tm.synthetic_groups(model, [(((4, 6),), 5, (3, 2, 4))])
    singles = [
        fg.Group(group.prompt_ids.clone(), [c], dict(group.vision)) for c in group.completions
    ]
    seen = count_patches(model)
    tokens = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    scores = fg.score(model, singles, self_check=False)
    assert seen == [24] and tokens == [group.prompt_ids.numel() + 9]
    want = tm.naive_logp(model, [group])
    for score, row in zip(scores, want[0], strict=True):
        torch.testing.assert_close(score.logp[0], row, atol=2e-5, rtol=0)
