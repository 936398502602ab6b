# SPDX-License-Identifier: Apache-2.0
"""Rollouts: the distribution of model.generate, each prompt prefilled once."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastgrpo.engine import score
from fastgrpo.errors import InputError
from fastgrpo.rollout import Sampling, generate
from fastgrpo.testing import models
from fastgrpo.testing.processors import tiny_tokenizer

pytestmark = pytest.mark.engine
QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def empty_groups(model, specs):
    return models.synthetic_groups(model, [(*spec, []) for spec in specs])


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


def transformers_chain(sampling, prompt_length):
    """The processors of `model.generate` for these settings, in its order."""
    chain = LogitsProcessorList()
    if sampling.penalizes:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.min_new_tokens:
        chain.append(
            MinNewTokensLengthLogitsProcessor(
                prompt_length, sampling.min_new_tokens, list(sampling.ends)
            )
        )
    chain.append(SuppressTokensLogitsProcessor(list(sampling.suppress)))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain


@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.05])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize(("min_p", "penalty"), [(0.0, 1.0), (0.07, 1.3), (1.0, 0.6), (0.3, 1.0)])
def test_sampling_distribution_equals_transformers(top_k, top_p, temperature, min_p, penalty):
    logits = torch.randn(5, 50) * 3
    so_far = torch.randint(0, 50, (5, 9))  # a prompt of 7 tokens and two more
    sampling = Sampling(
        temperature, top_k, top_p, (4, 9), min_p, penalty, min_new_tokens=3, ends=(1, 30)
    )
    expected = transformers_chain(sampling, 7)(so_far, logits.clone()).softmax(-1)
    seen = torch.zeros(5, 50, dtype=torch.bool).scatter_(1, so_far, True)
    got = sampling.probabilities(logits, seen, num_tokens=2)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    later = sampling.probabilities(logits, seen, num_tokens=3)
    assert not got[:, [1, 30]].any() and not got[:, [4, 9]].any()
    if (top_k, top_p, min_p) == (0, 1.0, 0.0):
        assert later[:, [1, 30]].all()


def test_samples_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 6).expand(20_000, 6)
    sampling = Sampling(temperature=0.8)
    tokens, logp = sampling.draw(logits, torch.Generator().manual_seed(1))
    expected = sampling.probabilities(logits[:1])[0]
    observed = torch.bincount(tokens, minlength=6) / len(tokens)
    assert (observed - expected).abs().max() < 0.015  # four standard deviations
    torch.testing.assert_close(logp.exp(), expected[tokens])


def test_rollouts_follow_the_distribution_of_every_setting_together():
    """4000 completions of two tokens against their exact probabilities by transformers' classes."""
    model = models.tiny_model("qwen2_5_vl")
    (group,) = empty_groups(model, [([(4, 4)], 3)])
    banned = (7, models.IMAGE_ID, models.VIDEO_ID)
    settings = dict(temperature=1.5, top_k=6, top_p=0.95, min_p=0.05, repetition_penalty=1.4)
    sampling = Sampling(**settings, suppress=banned)
    chain = transformers_chain(sampling, group.prompt_ids.numel())
    expected: dict[tuple, float] = {}

    def next_share(*ids):
        completion = torch.tensor([*ids, 0])
        logits = models.naive_logits(model, group, completion)[-1:]
        so_far = torch.cat([group.prompt_ids, completion[:-1]])[None]
        return chain(so_far, logits.clone()).softmax(-1)[0]

    with torch.no_grad():
        first = next_share()
        for a in first.nonzero()[:, 0].tolist():
            for b, share in enumerate(next_share(a).tolist()):
                expected[a, b] = float(first[a]) * share
    (filled,) = generate(
        model, [group], 4000, max_new_tokens=2, suppress_token_ids=(7,), seed=1, eos_token_id=(),
        **settings,
    )  # fmt: skip
    pairs = [tuple(c.tolist()) for c in filled.completions]
    assert len(set(pairs)) > 10
    for pair in expected | dict.fromkeys(pairs, 0.0):
        share = expected.get(pair, 0.0)
        deviation = (share * (1 - share) / 4000) ** 0.5
        assert abs(pairs.count(pair) / 4000 - share) <= 4.5 * deviation, pair


def stock_completions(model, groups, tokenizer=None, **settings):
    """Each group's completion by `model.generate`, one prompt at a time, cut after its end."""
    out = []
    for group in groups:
        inputs = dict(group.vision)
        if group.vision:
            inputs["mm_token_type_ids"] = (group.prompt_ids == models.IMAGE_ID).int()[None]
        ids = model.generate(
            input_ids=group.prompt_ids[None],
            attention_mask=torch.ones_like(group.prompt_ids)[None],
            generation_config=GenerationConfig(pad_token_id=0, **settings),
            tokenizer=tokenizer,
            **inputs,
        )
        out.append(ids[0, group.prompt_ids.numel() :].tolist())
    return out


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3"])
@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.8},
        {"min_new_tokens": 5},
        {"min_new_tokens": 8, "repetition_penalty": 1.2},
    ],
)
def test_greedy_settings_equal_model_generate(family, setting):
    model = models.tiny_model(family)
    images = [(4, 4)] if family in models.VLM_FAMILIES else []
    groups = empty_groups(model, [(images, 6), (images, 11), ([], 3)])
    free = generate(model, groups, 1, max_new_tokens=8, temperature=0.0, eos_token_id=())
    ends = [127, 151645]  # one outside the vocabulary
    if "min_new_tokens" in setting:  # ids that the rows would have early
        ends += sorted({int(group.completions[0][i]) for group in free for i in (1, 2)})
    banned = [models.IMAGE_ID, models.VIDEO_ID] if images else []
    expected = stock_completions(
        model, groups, max_new_tokens=8, eos_token_id=ends, suppress_tokens=banned or None,
        do_sample=False, **setting,
    )  # fmt: skip
    got = generate(
        model, groups, 2, max_new_tokens=8, temperature=0.0, eos_token_id=ends, **setting
    )
    for group, ids in zip(got, expected, strict=True):
        assert [c.tolist() for c in group.completions] == [ids, ids]
    plain = generate(model, groups, 2, max_new_tokens=8, temperature=0.0, eos_token_id=ends)
    same = [
        torch.equal(a.completions[0], b.completions[0]) for a, b in zip(got, plain, strict=True)
    ]
    assert not all(same)


def test_stop_strings_end_where_model_generate_ends():
    """Strings of several tokens, of a part of one, and one that begins in the prompt."""
    model = models.tiny_model("qwen2")
    tokenizer = tiny_tokenizer(model.config)
    groups = empty_groups(model, [([], 6), ([], 1), ([], 9)])
    free = generate(model, groups, 1, max_new_tokens=9, temperature=0.0, eos_token_id=())
    spelled = [tokenizer.convert_ids_to_tokens(g.completions[0].tolist()) for g in free]
    crossing = tokenizer.decode([int(groups[2].prompt_ids[-1]), int(free[2].completions[0][0])])
    strings = ["".join(spelled[0][3:5]), spelled[1][2][-1:], crossing]
    expected = stock_completions(
        model, groups, tokenizer, max_new_tokens=9, do_sample=False, stop_strings=strings
    )
    options = dict(max_new_tokens=9, temperature=0.0, eos_token_id=(), tokenizer=tokenizer)
    got = generate(model, groups, 2, stop_strings=strings, **options)
    for group, ids in zip(got, expected, strict=True):
        assert [c.tolist() for c in group.completions] == [ids, ids]
    lengths = [group.completions[0].numel() for group in got]
    assert lengths[0] <= 5 and lengths[1] <= 3 and lengths[2] == 1
    assert all(n < 9 for n in lengths)


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
        dict(num_generations=1, max_new_tokens=1, min_p=1.5),
        dict(num_generations=1, max_new_tokens=1, repetition_penalty=0.0),
        dict(num_generations=1, max_new_tokens=1, min_new_tokens=-1),
        dict(num_generations=1, max_new_tokens=1, stop_strings="a"),
        dict(num_generations=1, max_new_tokens=1, stop_strings=[""], tokenizer=object()),
    ):
        with pytest.raises(InputError):
            generate(model, groups, **options)
    filled = generate(model, groups, 1, max_new_tokens=1)
    with pytest.raises(InputError, match="completions already"):
        generate(model, filled, 1, max_new_tokens=1)
