# SPDX-License-Identifier: Apache-2.0
"""Attention over packed rows: backends against the oracle, the vision tower's, and the switch."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import fastgrpo as fg
from fastgrpo import attention
from fastgrpo.attention import kvgather, registry
from fastgrpo.attention.registry import get_backend
from fastgrpo.attention.vision import block_attention
from fastgrpo.packing import GroupLayout
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine
QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

ROWS = {
    "one_group": [(7, [5, 1, 9])],
    "prompt_of_one": [(1, [1, 1])],
    "no_completion": [(4, [])],
    "empty_completion": [(3, [0, 2, 0])],
    "many": [(17, [3, 33]), (1, [2]), (64, [64, 1, 65]), (5, [])],
    "many_tiny": [(2, [1, 2])] * 12,
}


def qkv(total, heads, kv_heads, dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(total, h, dim, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


def attend(name, inputs, layout, window=None):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = get_backend(name).attend(*inputs, layout, scale=0.3, window=window)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weight).sum(), inputs)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads, kv_heads", ((4, 4), (4, 2), (7, 1)))
@pytest.mark.parametrize("window", (None, 4))
@pytest.mark.parametrize("backend", ("kvgather", "prefix_cpu"))
def test_backend_on_the_cpu_equals_dense(row, heads, kv_heads, window, backend):
    layout = GroupLayout(ROWS[row])
    inputs = qkv(layout.total, heads, kv_heads, 8)
    want, want_grads = attend("dense", inputs, layout, window)
    got, got_grads = attend(backend, inputs, layout, window)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


BLOCKS = {  # row -> tokens that see one another in both directions
    "one_group": [(2, 5)],
    "no_completion": [(0, 4)],  # a whole prompt
    "many": [(0, 1), (3, 9), (9, 17), (53, 54), (60, 119)],
}


@pytest.mark.parametrize("row", BLOCKS)
@pytest.mark.parametrize("window", (None, 4))
def test_kvgather_equals_dense_with_tokens_that_see_both_ways(row, window):
    layout = GroupLayout(ROWS[row], blocks=BLOCKS[row])
    inputs = qkv(layout.total, 4, 2, 8)
    want, want_grads = attend("dense", inputs, layout, window)
    got, got_grads = attend("kvgather", inputs, layout, window)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_prefix_cpu_merges_parts_of_very_different_weight():
    """Own keys that outweigh the prompt's by e^90, and the other way round, in float32."""
    layout = GroupLayout([(5, [3, 2])])
    query, key, value = (x.abs() for x in qkv(layout.total, 2, 1, 8))
    for part in (slice(0, 5), slice(5, 10)):
        keys = torch.zeros_like(key)
        keys[part] = 60.0 * key[part]
        want, want_grads = attend("dense", [query, keys, value], layout)
        got, got_grads = attend("prefix_cpu", [x.float() for x in (query, keys, value)], layout)
        for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


def test_prefix_cpu_needs_gradients_of_some_inputs_only():
    layout = GroupLayout(ROWS["many"])
    query, key, value = qkv(layout.total, 4, 2, 8)
    value.requires_grad_()
    out = get_backend("prefix_cpu").attend(query, key, value, layout, scale=0.3)
    (got,) = torch.autograd.grad(out.sum(), value)
    want = attend("dense", [query, key, value.detach()], layout)[0]
    torch.testing.assert_close(out.detach(), want, atol=1e-12, rtol=0)
    out = get_backend("dense").attend(query, key, value, layout, scale=0.3)
    torch.testing.assert_close(got, torch.autograd.grad(out.sum(), value)[0])


@pytest.mark.parametrize("window", (None, 4))
def test_blocks_add_pairs_to_the_causal_mask_and_take_none(window):
    plain = GroupLayout(ROWS["many"]).dense_mask(window)
    mask = GroupLayout(ROWS["many"], blocks=BLOCKS["many"]).dense_mask(window)
    for query in range(len(mask)):
        seen = plain[query].clone()
        for start, end in BLOCKS["many"]:
            if start <= query < end:
                seen[start:end] = True
        assert torch.equal(mask[query], seen)


@pytest.mark.parametrize("blocks", ([(5, 9)], [(3, 6), (5, 7)], [(2, 2)], [(8, 9)]))
def test_blocks_lie_inside_one_prompt_and_apart(blocks):
    with pytest.raises(fg.InputError, match="blocks: .* inside one prompt"):
        GroupLayout(ROWS["one_group"], blocks=blocks)


def test_backends_without_a_mask_refuse_tokens_that_see_both_ways():
    device = torch.device("cpu")
    assert attention.choose_backend(None, device, torch.float32, 64, blocks=True) == "kvgather"
    for name in ("triton", "flash_attn", "torch_varlen", "xformers", "prefix_cpu"):
        with pytest.raises(fg.InputError, match=f"backend='{name}' .* see both ways"):
            attention.choose_backend(name, device, torch.float32, 64, blocks=True)
        layout = GroupLayout(ROWS["one_group"], backend=name, blocks=BLOCKS["one_group"])
        with pytest.raises(fg.InputError, match=r"tokens \(2, 5\), which see"):
            registry._attend_of(layout)


def test_dense_equals_each_sequence_alone():
    """The oracle itself: a completion's rows equal causal attention over prompt + completion."""
    layout = GroupLayout(ROWS["many"])
    q, k, v = qkv(layout.total, 2, 2, 8)
    out = get_backend("dense").attend(q, k, v, layout, scale=0.3)
    for start, end, prefix_start, prefix_end in layout.segments:
        rows = torch.cat([torch.arange(prefix_start, prefix_end), torch.arange(start, end)])
        x, y, z = (t[rows].transpose(0, 1) for t in (q, k, v))
        want = scaled_dot_product_attention(x, y, z, is_causal=True, scale=0.3).transpose(0, 1)
        torch.testing.assert_close(out[start:end], want[prefix_end - prefix_start :])


def test_kvgather_sums_prompt_gradients_in_float32():
    """G bfloat16 gradients into one prompt: the sum is as good as its own rounding."""
    layout = GroupLayout([(8, [4] * 32)])
    exact = qkv(layout.total, 2, 2, 16)
    low = [x.bfloat16() for x in exact]
    _, want = attend("kvgather", [x.double() for x in low], layout)
    _, got = attend("kvgather", low, layout)
    for a, b in zip(got[1:], want[1:], strict=True):
        error = (a[:8].double() - b[:8]).norm() / b[:8].norm()
        assert error <= 8e-3


@pytest.mark.parametrize("lengths", ([6], [4, 4, 4], [1, 5, 1, 3, 5], [64, 1]))
def test_vision_blocks_equal_a_loop(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = [x.requires_grad_() for x in qkv(sum(lengths), 3, 3, 8)]
    got = block_attention(*inputs, bounds, scale=0.2)
    want = torch.cat(
        [
            scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1) for x in inputs), scale=0.2
            ).transpose(0, 1)
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
    )
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", (*QWEN_VL, "qwen2", "qwen3", "llama"))
@pytest.mark.parametrize("original", ("sdpa", "eager"))
def test_install_delegates_and_uninstall_restores(family, original):
    model = tm.tiny_model(family)
    model.set_attn_implementation(original)
    (group,) = tm.synthetic_groups(model, [(((4, 6), (8, 8)), 5, (6,))])
    inputs = tm.forward_inputs(model, group, group.completions[0])
    want = model(**inputs).logits
    attention.install(model, tower=family in QWEN_VL)
    assert attention.is_installed(model)
    attention.install(model, tower=family in QWEN_VL)  # twice is once
    torch.testing.assert_close(model(**inputs).logits, want, atol=1e-5, rtol=0)
    attention.uninstall(model)
    assert not attention.is_installed(model)
    for config in (model.config, *(getattr(model.config, k) for k in model.config.sub_configs)):
        assert config._attn_implementation == original
    assert torch.equal(model(**inputs).logits, want)


def test_a_padded_batch_still_works_after_install():
    model = tm.tiny_model("qwen2")
    ids = torch.randint(0, 90, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    attention.install(model)
    got = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", QWEN_VL)
def test_tower_makes_one_attention_call_per_block(family, monkeypatch):
    from fastgrpo.attention import registry

    calls = []
    real = registry.vision_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(registry, "vision_attention", counted)
    monkeypatch.setattr(registry, "_fallbacks", {})  # registers anew, with the counter
    model = tm.tiny_model(family)
    fg.score(model, tm.synthetic_groups(model), self_check=False)
    assert len(calls) == model.config.vision_config.depth


def test_what_a_layout_cannot_express_is_refused():
    model = tm.tiny_model("qwen2")
    attention.install(model)
    layout = GroupLayout([(3, [2])])
    ids = torch.randint(0, 90, (1, 5))
    with pytest.raises(fg.InputError, match="attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 5, 5, dtype=bool), fg_layout=layout)
    with pytest.raises(fg.InputError, match="batch 1 and 5 tokens"):
        model(input_ids=ids.expand(2, -1), fg_layout=layout)
    with pytest.raises(fg.InputError, match="batch 1 and 5 tokens"):
        model(input_ids=ids[:, :4], fg_layout=layout)


def test_backend_names():
    cpu = torch.device("cpu")
    assert attention.choose_backend(None, cpu, torch.float32, 64) == "prefix_cpu"
    assert attention.choose_backend(None, cpu, torch.bfloat16, 64) == "kvgather"
    with pytest.raises(fg.InputError, match="backend must be one of .*dense"):
        attention.choose_backend("fast", torch.device("cpu"), torch.float32, 64)


@pytest.mark.parametrize("family", ("qwen2_5_vl", "llama"))
def test_a_saved_model_does_not_mention_the_switch(family, tmp_path):
    model = tm.tiny_model(family)
    attention.install(model)
    model.save_pretrained(tmp_path)
    assert "fastgrpo" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert not attention.is_installed(loaded)


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3", "gemma3"))
def test_under_autocast_a_backend_gets_one_dtype(family, monkeypatch):
    """As the stock attention does, whose queries and keys rotary embeddings leave in float32: on a
    GPU every kernel asks for it."""
    seen, original = set(), kvgather.attend

    def attend(query, key, value, *args, **options):
        seen.add((query.dtype, key.dtype, value.dtype))
        return original(query, key, value, *args, **options)

    monkeypatch.setattr(kvgather, "attend", attend)
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model)
    with torch.autocast("cpu", torch.bfloat16):
        scores = fg.score(model, groups, backend="kvgather")
        with torch.no_grad():
            want = tm.naive_logp(model, groups)
        empty = [fg.Group(group.prompt_ids, [], group.vision) for group in groups]
        filled = fg.generate(model, empty, 2, max_new_tokens=4, backend="kvgather", seed=0)
        sampled = fg.score(model, filled, backend="kvgather", self_check=False)
    (scores[0].logp[0].sum() + scores[3].logp[0].sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert seen == {(torch.bfloat16,) * 3}
    for score, plain in zip(scores, want, strict=True):
        for ours, theirs in zip(score.logp, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.15)
    for group, score in zip(filled, sampled, strict=True):
        for ours, theirs in zip(group.rollout_logp, score.logp, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.15)
