# SPDX-License-Identifier: Apache-2.0
"""One file per family: discovery, and what every family must show."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo import models
from fastgrpo.models import registry
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

# 0, 1 and 3 images; ragged and one-token completions; prompts of 1 and 2 tokens; G = 1 to 5
SPECS = (
    ([(4, 6)], 5, [7, 3, 9, 1, 2]),
    ([(4, 4), (6, 8), (4, 4)], 4, [6]),
    ([], 2, [4, 8, 1]),
    ([], 1, [3, 2]),
    ([(8, 8)], 3, [5, 70]),
)

# Beside them where there are videos: one longer in time than wide.
VIDEO = ([], 4, [3, 1], [(3, 4, 4)])

# The other families repeat what these show, in `make test-slow`.
CORE = ("gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "smolvlm")
EVERY = [pytest.param(f, marks=() if f in CORE else pytest.mark.slow) for f in tm.FAMILIES]

OLMO = """
from fastgrpo.models.family import Family

FAMILIES = (Family("olmo"),)
"""


@pytest.fixture
def added_family(tmp_path, monkeypatch):
    """A folder with one more file, beside those of `fastgrpo.models`."""
    (tmp_path / "olmo_of_a_test.py").write_text(OLMO)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    registry.families.cache_clear()
    yield "olmo"
    registry.families.cache_clear()


def test_one_file_adds_a_family(added_family):
    model = tm.tiny_model(added_family)
    groups = tm.synthetic_groups(model)
    scores = [s.logp for s in fg.score(model, groups)]
    for row, plain in zip(scores, tm.naive_logp(model, groups), strict=True):
        for ours, theirs in zip(row, plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    metrics = fg.GRPOStep(model, fg.Objective())(groups)
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0
    assert all(p.grad is not None for p in model.parameters())
    (group,) = fg.generate(
        model, [fg.Group(groups[0].prompt_ids, [])], 2, max_new_tokens=3, eos_token_id=()
    )
    assert [len(ids) for ids in group.completions] == [3, 3]


def test_without_its_file_the_family_is_refused():
    from transformers import OlmoConfig

    with pytest.raises(fg.InputError, match="'olmo' is not served"):
        registry.family_of(OlmoConfig())


@pytest.mark.parametrize("name", sorted(registry.REFUSED.keys() - models.families().keys()))
def test_a_refusal_has_its_reason(name):
    from transformers import PretrainedConfig

    config = PretrainedConfig()
    config.model_type = name
    with pytest.raises(fg.InputError, match=f"'{name}' is not served: .*; the packed forward"):
        registry.family_of(config)


def specs_of(family):
    return (*SPECS, VIDEO) if models.families()[family].video_inputs else SPECS


def naive(model, groups):
    logp = tm.naive_logp(model, groups)
    tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    return logp, tm.take_grads(model)


def tightest(groups):
    """The smallest max_tokens: several rows, and prompts that are split between them."""
    return max(g.prompt_ids.numel() + max(g.lengths) for g in groups)


def errors(model, groups, want, max_tokens=None, zero=()):
    """The largest error of a log-prob, and of a gradient relative to its parameter's largest but
    for those in `zero`."""
    logp = [s.logp for s in fg.score(model, groups, self_check=False, max_tokens=max_tokens)]
    tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    worst = max(
        float((ours - theirs).detach().abs().max())
        for row, plain in zip(logp, want[0], strict=True)
        for ours, theirs in zip(row, plain, strict=True)
    )
    given = tm.take_grads(model), want[1]
    grads = [{name: grad for name, grad in g.items() if name not in zero} for g in given]
    return worst, tm.grad_error(*grads)[0]


@pytest.mark.parametrize("family", tm.FAMILIES)
def test_packed_equals_one_by_one(family, record_property):
    """In float64, in one row and in rows that split groups."""
    with tm.float64_norms():
        model = tm.tiny_model(family, torch.float64)
        groups = tm.synthetic_groups(model, specs_of(family))
        want = naive(model, groups)
        worst = max(*errors(model, groups, want), *errors(model, groups, want, tightest(groups)))
    record_property("worst", worst)
    assert worst <= 1e-12


@pytest.mark.parametrize("family", EVERY)
def test_float32_adds_only_its_rounding(family, record_property):
    """To every gradient that is not truly zero, as that of a key's bias is."""
    model = tm.tiny_model(family, torch.float64)
    with tm.float64_norms():
        _, exact = naive(model, tm.synthetic_groups(model, specs_of(family)))
    sizes = {name: float(grad.abs().max()) for name, grad in exact.items() if grad is not None}
    zero = {name for name, size in sizes.items() if size <= 1e-12 * max(sizes.values())}
    assert all(name.endswith("k_proj.bias") for name in zero), zero
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model, specs_of(family))
    want = naive(model, groups)
    found = [errors(model, groups, want, n, zero) for n in (None, tightest(groups))]
    worst = max(map(max, found))
    record_property("worst", worst)
    assert worst <= 2e-5


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("family", EVERY)
def test_adapters_under_checkpointing(family, reentrant, record_property):
    """LoRA on every linear layer of decoder, tower and head, activations computed twice; what a
    reentrant checkpoint loses of a tower whose input needs no gradient is lost in the plain forward
    too."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    with tm.float64_norms():
        base = tm.tiny_model(family, torch.float64)
        linear = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
        lora = peft.LoraConfig(r=2, target_modules=linear, init_lora_weights=False)
        model = peft.get_peft_model(base, lora).double().train()
        groups = tm.synthetic_groups(base, SPECS[:3])
        tm.checkpoint_activations(base, reentrant=reentrant)
        base.enable_input_require_grads()
        want = naive(model, groups)
        assert want[1]["base_model.model.lm_head.lora_B.default.weight"].any()
        if reentrant and getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
            with pytest.raises(fg.InputError, match="their gradient is lost"):
                errors(model, groups, want)
            return
        worst = max(errors(model, groups, want))
    record_property("worst", worst)
    assert worst <= 1e-12


@pytest.mark.parametrize("family", [p for p in EVERY if p.values[0] in tm.VLM_FAMILIES])
def test_distinct_images_are_encoded_once(family, monkeypatch):
    model = tm.tiny_model(family)
    specs = [([(4, 6)], 5, [3, 2]), ([(4, 6)], 3, [4]), ([(8, 8)], 3, [2])]
    groups = tm.synthetic_groups(model, specs)
    shared = groups[0].vision
    groups[1] = fg.Group(groups[1].prompt_ids, groups[1].completions, shared)
    seen = []
    tower = models.families()[family].tower(model)
    tower.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    fg.score(model, groups, self_check=False)
    assert len(seen) == 1
    fg.score(model, groups, self_check=False, max_tokens=tightest(groups))
    assert len(seen) <= 1 + 2  # once more for each row that brings a new image


@pytest.mark.parametrize("family", EVERY)
def test_a_completion_changes_no_other(family):
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model, SPECS[:3])
    with torch.no_grad():
        before = fg.score(model, groups, self_check=False)
        groups[0].completions[1] = (groups[0].completions[1] + 1) % 90
        after = fg.score(model, groups, self_check=False)
    for g, (old, new) in enumerate(zip(before, after, strict=True)):
        for c, (a, b) in enumerate(zip(old.logp, new.logp, strict=True)):
            assert torch.equal(a, b) != ((g, c) == (0, 1))


@pytest.mark.parametrize("family", EVERY)
def test_greedy_rollout_equals_model_generate(family):
    """Prompts with two images, without, and of one token; the log-probs are those `score` gives."""
    model = tm.tiny_model(family)
    specs = [([(4, 4), (6, 4)], 6, []), ([], 5, []), ([], 1, [])]
    groups = tm.synthetic_groups(model, specs)
    settings = dict(max_new_tokens=6, eos_token_id=3)
    filled = fg.generate(model, groups, 2, temperature=0.0, **settings)
    for group, scored in zip(filled, fg.score(model, filled), strict=True):
        empty = group.prompt_ids[:0]
        out = model.generate(
            **tm.forward_inputs(model, group, empty),
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(models.Adapter(model).placeholders) or None,
            **settings,
        )[0, group.prompt_ids.numel() :]
        for ids, sampled, logp in zip(
            group.completions, group.rollout_logp, scored.logp, strict=True
        ):
            assert ids.tolist() == out.tolist()
            torch.testing.assert_close(sampled, logp, rtol=0, atol=2e-5)


def test_images_that_see_both_ways_need_it(monkeypatch):
    """Gemma 3 with one causal mask for all segments is another model."""
    model = tm.tiny_model("gemma3")
    groups = tm.synthetic_groups(model, SPECS[:2])
    want = naive(model, groups)
    assert max(errors(model, groups, want)) <= 2e-5
    with pytest.raises(
        fg.InputError, match="'torch_varlen' cannot serve: it has no tokens that see both ways"
    ):
        fg.score(model, groups, backend="torch_varlen")
    monkeypatch.setattr(type(models.families()["gemma3"]), "blocks", lambda *args: [])
    assert min(errors(model, groups, want)) > 1e-3
