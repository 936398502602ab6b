"""Rollouts: the distribution of model.generate, each prompt prefilled once."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastgrpo.engine import score
from fastgrpo.errors import InputError
from fastgrpo.rollout import Sampling, generate
from fastgrpo.testing import models

pytestmark = pytest.mark.engine
QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def empty_groups(model, specs):
    groups = models.synthetic_groups(model, [(*spec, []) for spec in specs])
    for group in groups:
        group.advantages = None
    return groups


@pytest.mark.parametrize("family", (*QWEN_VL, "qwen2", "qwen3", "llama"))
def test_rollout_logp_is_what_score_gives(family):
    model = models.tiny_model(family)
    images = [[(4, 6)], []] if family in QWEN_VL else [[], []]
    groups = empty_groups(model, [(images[0], 5), (images[1], 11)])
    filled = generate(model, groups, 3, max_new_tokens=6, temperature=0.7, seed=0)
    for group, result in zip(filled, score(model, filled, temperature=0.7), strict=True):
        assert len(group.completions) == 3
        for sampled, scored in zip(group.rollout_logp, result.logp, strict=True):
            torch.testing.assert_close(sampled, scored, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llama"])
def test_greedy_equals_model_generate(family):
    model = models.tiny_model(family)
    images = [(4, 4), (6, 4)] if family in QWEN_VL else []
    (group,) = empty_groups(model, [(images, 6)])
    (filled,) = generate(model, [group], 2, max_new_tokens=8, temperature=0.0, eos_token_id=[3])
    inputs = dict(group.vision)
    if images:
        inputs["mm_token_type_ids"] = (group.prompt_ids == models.IMAGE_ID).int()[None]
    settings = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=3, pad_token_id=0)
    suppress = [models.IMAGE_ID, models.VIDEO_ID] if images else None
    out = model.generate(
        input_ids=group.prompt_ids[None],
        attention_mask=torch.ones_like(group.prompt_ids)[None],
        generation_config=settings,
        suppress_tokens=suppress,
        **inputs,
    )[0, group.prompt_ids.numel() :]
    for completion in filled.completions:
        assert completion.tolist() == out[: completion.numel()].tolist()
        assert completion.numel() == out.numel()


@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.05])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_sampling_distribution_equals_transformers(top_k, top_p, temperature):
    logits = torch.randn(5, 50) * 3
    chain = LogitsProcessorList([SuppressTokensLogitsProcessor([4, 9])])
    chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    expected = chain(None, logits.clone()).softmax(-1)
    got = Sampling(temperature, top_k, top_p, (4, 9)).probabilities(logits)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_samples_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 6).expand(20_000, 6)
    sampling = Sampling(temperature=0.8)
    tokens, logp = sampling.draw(logits, torch.Generator().manual_seed(1))
    expected = sampling.probabilities(logits[:1])[0]
    observed = torch.bincount(tokens, minlength=6) / len(tokens)
    assert (observed - expected).abs().max() < 0.015  # four standard deviations
    torch.testing.assert_close(logp.exp(), expected[tokens])


def test_seed_repeats_and_the_default_generator_is_left_alone():
    model = models.tiny_model("qwen2_5_vl")
    groups = empty_groups(model, [([(4, 4)], 3)])
    before = torch.random.get_rng_state()
    first, again, other = (
        generate(model, groups, 4, max_new_tokens=5, seed=s)[0].completions for s in (3, 3, 4)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_completions_end_with_the_first_end_token():
    model = models.tiny_model("qwen2")
    groups = empty_groups(model, [([], 4), ([], 9)])
    ends = list(range(0, 60))
    filled = generate(model, groups, 8, max_new_tokens=12, eos_token_id=ends, seed=0)
    lengths = set()
    for group in filled:
        for completion, logp in zip(group.completions, group.rollout_logp, strict=True):
            assert completion.shape == logp.shape
            inside = torch.isin(completion, torch.tensor(ends))
            assert not inside[:-1].any()
            assert inside[-1] or completion.numel() == 12
            lengths.add(completion.numel())
    assert len(lengths) > 1


def test_suppressed_ids_and_placeholders_are_never_sampled():
    model = models.tiny_model("qwen2_5_vl")
    groups = empty_groups(model, [([(4, 4)], 3)])
    allowed = {5, models.IMAGE_ID, models.VIDEO_ID}
    suppress = [i for i in range(models.VOCAB) if i not in allowed]
    (group,) = generate(model, groups, 4, max_new_tokens=3, suppress_token_ids=suppress, seed=0)
    assert {int(t) for c in group.completions for t in c} == {5}


def test_vision_runs_once_per_prompt_and_modes_are_restored():
    model = models.tiny_model("qwen2_5_vl").train()
    model.model.visual.eval()
    groups = empty_groups(model, [([(4, 4)], 3), ([(6, 4)], 2)])
    patches = []
    hook = model.model.visual.register_forward_pre_hook(
        lambda m, args, kwargs: patches.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    generate(model, groups, 6, max_new_tokens=4, seed=0)
    hook.remove()
    assert sum(patches) == 4 * 4 + 6 * 4
    assert model.training and not model.model.visual.training


def test_prompts_may_be_encoded_in_several_rows():
    model = models.tiny_model("qwen3")
    groups = empty_groups(model, [([], 7), ([], 12), ([], 3)])
    whole = generate(model, groups, 2, max_new_tokens=5, temperature=0.0)
    parts = generate(model, groups, 2, max_new_tokens=5, temperature=0.0, max_tokens=12)
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.completions, b.completions, strict=True))


def test_sliding_window_counts_prompt_and_own_tokens():
    options = dict(sliding_window=4, use_sliding_window=True, max_window_layers=0)
    model = models.tiny_model("qwen2", text=options)
    groups = empty_groups(model, [([], 9), ([], 2)])
    filled = generate(model, groups, 2, max_new_tokens=7, seed=0)
    for group, result in zip(filled, score(model, filled), strict=True):
        for sampled, scored in zip(group.rollout_logp, result.logp, strict=True):
            torch.testing.assert_close(sampled, scored, rtol=0, atol=2e-5)


def test_refusals():
    model = models.tiny_model("qwen2")
    groups = empty_groups(model, [([], 4)])
    assert generate(model, [], 2, max_new_tokens=3) == []
    for options in (
        dict(num_generations=0, max_new_tokens=2),
        dict(num_generations=1, max_new_tokens=0),
        dict(num_generations=1, max_new_tokens=1, temperature=-1.0),
        dict(num_generations=1, max_new_tokens=1, temperature=float("nan")),
        dict(num_generations=1, max_new_tokens=1, top_p=0.0),
        dict(num_generations=1, max_new_tokens=1, top_k=-1),
    ):
        with pytest.raises(InputError):
            generate(model, groups, **options)
    filled = generate(model, groups, 1, max_new_tokens=1)
    with pytest.raises(InputError, match="completions already"):
        generate(model, filled, 1, max_new_tokens=1)
