# SPDX-License-Identifier: Apache-2.0
"""fg.score equals one-sequence-at-a-time forwards of the stock model, values and every gradient."""

import itertools

import pytest
import torch

import fastgrpo as fg
from fastgrpo.engine import forward
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine
QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

DEFAULTS = ({},)  # one run without options
BACKENDS = tuple({"backend": name} for name in ("dense", "kvgather", "prefix_cpu"))
IMAGES = {0: (), 1: ((4, 6),), 2: ((4, 4), (6, 10))}
# ragged crosses a power of two; one-token completions have only the shared prompt row to predict
LENGTHS = {"single": (5,), "ragged": (9, 1, 4, 8), "one_token": (1, 1, 1)}
CASES = [
    (family, images, many, lengths)
    for family, images, many, lengths in itertools.product(
        (*QWEN_VL, "qwen2"), IMAGES, (False, True), LENGTHS
    )
    if family in QWEN_VL or images == 0
]


def make_groups(model, images, many, lengths):
    first = (IMAGES[images], 6, LENGTHS[lengths])
    others = [((), 11, (3, 1)), (IMAGES[1], 2, (2, 7)), (IMAGES[2], 4, (5,))]
    return tm.synthetic_groups(model, [others[0], first, *others[1:]] if many else [first])


def naive(model, groups):
    weights = tm.random_weights(groups)
    logp = tm.naive_logp(model, groups)
    tm.weighted_sum(logp, weights).backward()
    return [[x.detach() for x in row] for row in logp], tm.take_grads(model)


def packed(model, groups, **options):
    logp = [s.logp for s in fg.score(model, groups, self_check=False, **options)]
    tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    return [[x.detach() for x in row] for row in logp], tm.take_grads(model)


def logp_error(got, want):
    pairs = zip(itertools.chain(*got), itertools.chain(*want), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs if b.numel())


def assert_equal_to_naive(model, groups, limit=2e-5, runs=DEFAULTS):
    """`score` with each of the options `runs`, against the forwards one by one."""
    want, want_grads = naive(model, groups)
    for options in runs:
        got, got_grads = packed(model, groups, **options)
        assert got[0][0].dtype == model.dtype
        assert logp_error(got, want) <= limit, options
        error, where = tm.grad_error(got_grads, want_grads)
        assert error <= limit, (options, where)


@pytest.mark.parametrize("family, images, many, lengths", CASES)
def test_score_float32_matrix(family, images, many, lengths):
    model = tm.tiny_model(family)
    assert_equal_to_naive(model, make_groups(model, images, many, lengths), runs=BACKENDS)


@pytest.mark.parametrize("family", (*QWEN_VL, "qwen2", "qwen3", "llama"))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_score_float64_to_rounding(family, lengths):
    model = tm.tiny_model(family, torch.float64)
    groups = make_groups(model, 2 if family in QWEN_VL else 0, True, lengths)
    with tm.float64_norms():
        assert_equal_to_naive(model, groups, 1e-12, BACKENDS)


@pytest.mark.parametrize("family", ("qwen3", "llama"))
def test_score_float32_other_text_families(family):
    model = tm.tiny_model(family)
    assert_equal_to_naive(model, tm.synthetic_groups(model), runs=BACKENDS)


def test_negative_control_positions_not_rewound(monkeypatch):
    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    want, _ = naive(model, groups)
    real = type(model).forward

    def forward(self, position_ids=None, **kwargs):
        if position_ids is not None:
            position_ids = torch.arange(position_ids.shape[-1]).expand_as(position_ids)
        return real(self, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forward.__get__(model))
    got, _ = packed(model, groups)
    assert logp_error(got, want) > 0.1


def test_negative_control_continuing_at_prompt_length(monkeypatch):
    """M-RoPE positions go on after the prompt's maximum; its length is another number."""
    from fastgrpo.models import Adapter

    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    want, _ = naive(model, groups)
    real = Adapter.prompt_positions

    def positions(self, ids, vision):
        out = real(self, ids, vision).clone()
        out[:, -1] = len(ids) - 1
        return out

    monkeypatch.setattr(Adapter, "prompt_positions", positions)
    got, _ = packed(model, groups)
    assert logp_error(got, want) > 0.01


@pytest.mark.parametrize("rows", (3, 4))
def test_negative_control_packing_inferred_by_transformers(rows):
    """The same row given to the stock model, which guesses sequences from positions, is wrong."""
    from fastgrpo.models import Adapter
    from fastgrpo.packing import PackedRow, plan_rows, regroup

    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    want, _ = naive(model, groups)
    (parts,) = plan_rows(regroup(groups))
    row = PackedRow(Adapter(model), parts, groups, "dense")
    inputs = row.inputs | row.images.inputs(row.image_ids, torch.device("cpu"))
    for key in ("fg_layout", "attention_mask", "logits_to_keep"):
        inputs.pop(key)
    if rows == 4:
        text = row.layout.token_tables()[3][None, None]
        inputs["position_ids"] = torch.cat([text, inputs["position_ids"]])
    logits = model(**inputs).logits[0, row.layout.keep_rows[row.layout.pred_index]]
    logp = torch.log_softmax(logits, -1).gather(-1, row.targets[:, None])[:, 0]
    want = torch.cat([x for line in want for x in line])
    assert float((logp - want).detach().abs().max()) > 0.1


def test_temperature_and_entropy():
    model = tm.tiny_model("qwen3_vl")
    groups = tm.synthetic_groups(model)
    scores = fg.score(model, groups, temperature=0.7, outputs=("logp", "entropy"))
    want = tm.naive_logp(model, groups, temperature=0.7)
    assert logp_error([s.logp for s in scores], want) <= 2e-5
    for group, result in zip(groups, scores, strict=True):
        for completion, entropy in zip(group.completions, result.entropy, strict=True):
            logits = tm.naive_logits(model, group, completion) / 0.7
            expected = torch.distributions.Categorical(logits=logits).entropy()
            torch.testing.assert_close(entropy, expected, atol=2e-5, rtol=1e-5)
    assert fg.score(model, groups)[0].entropy is None


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl", "llama"))
@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing_in_train_mode(family, reentrant):
    model = tm.tiny_model(family).train()
    groups = tm.synthetic_groups(model)
    want, want_grads = naive(model, groups)
    tm.checkpoint_activations(model, reentrant=reentrant)
    model.enable_input_require_grads()
    got, got_grads = packed(model, groups)
    assert logp_error(got, want) <= 2e-5
    error, where = tm.grad_error(got_grads, want_grads)
    assert error <= 2e-5, where


@pytest.mark.parametrize("family", QWEN_VL)
def test_frozen_tower_has_no_gradient_and_changes_no_other(family):
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model)
    _, want = naive(model, groups)
    model.model.visual.requires_grad_(False)
    _, got = packed(model, groups)
    for name in want:
        if ".visual." in name:
            assert got.pop(name) is None
    error, where = tm.grad_error(got, {n: want[n] for n in got})
    assert error <= 2e-5, where


def test_bfloat16_autocast_is_as_near_to_float32_as_the_plain_forward():
    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    exact = tm.naive_logp(model, groups)
    with torch.autocast("cpu", torch.bfloat16):
        plain = tm.naive_logp(model, groups)
        got, grads = packed(model, groups)
    flat = [torch.cat([x.float() for row in rows for x in row]) for rows in (exact, plain, got)]
    assert (flat[2] - flat[0]).abs().mean() <= 2 * (flat[1] - flat[0]).abs().mean()
    assert all(torch.isfinite(g).all() for g in grads.values() if g is not None)


def test_bfloat16_model():
    model = tm.tiny_model("qwen2_5_vl")
    groups = tm.synthetic_groups(model)
    exact = torch.cat([x for row in tm.naive_logp(model, groups) for x in row])
    model = model.bfloat16()
    plain = torch.cat([x for row in tm.naive_logp(model, groups) for x in row])
    got = torch.cat([x for s in fg.score(model, groups) for x in s.logp])
    assert got.dtype == torch.float32
    assert (got - exact).abs().mean() <= 2 * (plain - exact).abs().mean()


def test_sliding_window_layers():
    config = dict(
        sliding_window=4,
        use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = tm.tiny_model("qwen2", text=config)
    groups = tm.synthetic_groups(model)
    assert_equal_to_naive(model, groups, runs=BACKENDS)
    full = tm.tiny_model("qwen2")
    full.load_state_dict(model.state_dict())
    windowed, _ = naive(model, groups)
    assert logp_error(packed(full, groups)[0], windowed) > 0.01  # the window matters here


def test_tied_embeddings():
    model = tm.tiny_model(
        "qwen2_5_vl", text={"tie_word_embeddings": True}, tie_word_embeddings=True
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_equal_to_naive(model, tm.synthetic_groups(model))


def test_512_tiny_samples_in_one_row():
    model = tm.tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (512, 3), generator=generator)
    groups = [fg.Group(row[:2], [row[2:]]) for row in ids]
    got = torch.cat([s.logp[0] for s in fg.score(model, groups)])
    logits = model(input_ids=ids).logits[:, 1]
    want = torch.log_softmax(logits, -1).gather(-1, ids[:, 2:])[:, 0]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_eager_model_keeps_its_numbers():
    model = tm.tiny_model("qwen2_5_vl")
    model.set_attn_implementation("eager")
    assert_equal_to_naive(model, tm.synthetic_groups(model))


def test_any_budget_gives_the_same():
    model = tm.tiny_model("qwen3_vl")
    runs = [{"max_tokens": tokens} for tokens in (None, 60, 41)]
    assert_equal_to_naive(model, tm.synthetic_groups(model), runs=runs)


def test_no_grad_builds_no_graph():
    model = tm.tiny_model("qwen2_5_vl")
    with torch.no_grad():
        scores = fg.score(model, tm.synthetic_groups(model))
    assert not scores[0].logp[0].requires_grad


def test_masked_tokens_are_zero_and_have_no_gradient():
    model = tm.tiny_model("qwen2")
    (group,) = tm.synthetic_groups(model, [((), 5, (4, 3))])
    mask = [torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 0])]
    masked = fg.Group(group.prompt_ids, group.completions, mask=mask)
    (scores,) = fg.score(model, [masked], outputs=("logp", "entropy"))
    (plain,) = fg.score(model, [group])
    for i in range(2):
        torch.testing.assert_close(scores.logp[i], plain.logp[i] * mask[i], atol=1e-6, rtol=0)
        assert (scores.entropy[i][mask[i] == 0] == 0).all()
    scores.logp[1].sum().backward()
    assert all(not g.any() for g in tm.take_grads(model).values() if g is not None)


def test_empty_completions_and_groups():
    model = tm.tiny_model("qwen2_5_vl")
    one, two = tm.synthetic_groups(model, [(((4, 4),), 5, (4, 3)), ((), 3, (2,))])
    none = torch.zeros(0, dtype=torch.int64)
    ragged = fg.Group(one.prompt_ids, [none, one.completions[0], none], one.vision)
    only_empty = fg.Group(two.prompt_ids, [none])
    nothing = fg.Group(two.prompt_ids, [])
    scores = fg.score(model, [ragged, only_empty, nothing])
    assert [[x.numel() for x in s.logp] for s in scores] == [[0, 4, 0], [0], []]
    torch.testing.assert_close(
        scores[0].logp[1], fg.score(model, [one])[0].logp[0], atol=1e-5, rtol=0
    )
    assert fg.score(model, []) == []


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_cpu_encodes_large_images_one_by_one(monkeypatch, family):
    monkeypatch.setattr(forward, "_CALL_ON_CPU", 1)
    model = tm.tiny_model(family, torch.float64)
    specs = [([(4, 6), (8, 8)], 3, [4, 2], [(2, 4, 4), (1, 4, 4)]), ([(6, 4)], 4, [3])]
    groups = tm.synthetic_groups(model, specs)
    sizes = []
    model.model.visual.patch_embed.register_forward_hook(lambda *a: sizes.append(len(a[1][0])))
    weights = tm.random_weights(groups)
    with tm.float64_norms():
        scores = fg.score(model, groups, self_check=False)
        assert sizes == [4 * 6, 8 * 8, 6 * 4, 2 * 4 * 4, 4 * 4]  # images, then videos
        tm.weighted_sum([s.logp for s in scores], weights).backward()
        grads = tm.take_grads(model)
        tm.weighted_sum(tm.naive_logp(model, groups), weights).backward()
    error, where = tm.grad_error(grads, tm.take_grads(model))
    assert error < 1e-12, where
    monkeypatch.setattr(forward, "_CALL_ON_CPU", 2**20)  # small ones together
    sizes.clear()
    fg.score(model, groups, self_check=False)
    assert sizes == [4 * 6 + 8 * 8 + 6 * 4, 2 * 4 * 4 + 4 * 4]


def test_weights_in_shards_take_one_call_of_the_tower(monkeypatch):
    monkeypatch.setattr(forward, "_CALL_ON_CPU", 1)
    model = tm.tiny_model("qwen2_5_vl")
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks it
    calls = []
    model.model.visual.register_forward_hook(lambda *a: calls.append(1))
    fg.score(model, tm.synthetic_groups(model), self_check=False)
    assert len(calls) == 1
