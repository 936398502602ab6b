# SPDX-License-Identifier: Apache-2.0
"""Log-probs as rewards and second rollouts against plain forwards of the stock model."""

import pytest
import torch

from fastgrpo import judges
from fastgrpo.engine.next_token import next_token_logits
from fastgrpo.errors import InputError
from fastgrpo.packing import Group
from fastgrpo.testing import models

SPECS = [([(4, 6)], 5, []), ([], 9, [])]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llama"])
def test_next_token_logits_equal_the_plain_forward(family):
    model = models.tiny_model(family)
    groups = models.synthetic_groups(model, SPECS)
    ids = [5, 0, 77]
    full = next_token_logits(model, groups)
    some = next_token_logits(model, groups, token_ids=ids, max_tokens=20)
    for group, row, few in zip(groups, full, some, strict=True):
        plain = model(**models.forward_inputs(model, group, group.prompt_ids[:0])).logits[0, -1]
        torch.testing.assert_close(row, plain, rtol=0, atol=2e-5)
        torch.testing.assert_close(few, plain[ids], rtol=0, atol=2e-5)


def test_continuation_logp_equals_one_forward_each():
    model = models.tiny_model("qwen2_5_vl")
    contexts = models.synthetic_groups(model, SPECS)
    continuations = [[torch.tensor([3, 4, 5]), torch.tensor([7])], [torch.tensor([1, 2])]]
    got = judges.continuation_logp(model, contexts, continuations)
    for context, ids, values in zip(contexts, continuations, got, strict=True):
        whole = Group(context.prompt_ids, ids, context.vision)
        expected = [lp.mean() for lp in models.naive_logp(model, [whole])[0]]
        torch.testing.assert_close(values, torch.stack(expected), rtol=0, atol=2e-5)


def text_context(prompt, completion, row):
    return Group(torch.tensor(list(completion.encode()), dtype=torch.int64) % 90, [])


def test_follow_up_likelihood_is_the_mean_contrast_over_dimensions():
    model = models.tiny_model("llama")
    good, bad = [torch.tensor([3, 4]), torch.tensor([5])], [torch.tensor([6])]
    other = [torch.tensor([9, 9])], [torch.tensor([8]), torch.tensor([7])]
    reward = judges.FollowUpLikelihood(model, text_context, [(good, bad), other])
    got = reward(["q", "q"], ["abc", "de"])
    for text, value in zip(["abc", "de"], got, strict=True):
        context = text_context(None, text, {})
        sides = [*good, *bad, *other[0], *other[1]]
        lp = [x.mean() for x in models.naive_logp(model, [Group(context.prompt_ids, sides)])[0]]
        first = (lp[0] + lp[1]) / 2 - lp[2]
        second = lp[3] - (lp[4] + lp[5]) / 2
        assert value == pytest.approx(((first + second) / 2).item(), abs=2e-5)
    with pytest.raises(InputError, match="dimensions"):
        judges.FollowUpLikelihood(model, text_context, [(good, [])])


def test_choice_probability_is_a_softmax_over_the_choices():
    model = models.tiny_model("llama")
    reward = judges.ChoiceProbability(model, text_context, [10, 11, 12])
    got = reward(["q", "q"], ["abc", "de"], choice=[2, 0])
    for text, choice, value in zip(["abc", "de"], [2, 0], got, strict=True):
        ids = text_context(None, text, {}).prompt_ids
        logits = model(ids[None]).logits[0, -1, 10:13]
        assert value == pytest.approx(logits.softmax(0)[choice].item(), abs=1e-5)


def test_second_pass_scores_what_the_model_says_next():
    model = models.tiny_model("llama")
    seen = {}

    def prompt(completion, row):
        return None if not completion else text_context(None, completion + row["problem"], row)

    def reward(prompts, completions, *, solution, **columns):
        seen.update(texts=[c[0]["content"] for c in completions], solution=solution)
        return [float(s) for s in solution]

    second = judges.SecondPass(
        prompt, reward, lambda ids: " ".join(map(str, ids)), model=model, max_new_tokens=4,
        temperature=0.0, missing=-1.0,
    )  # fmt: skip
    got = second(["q"] * 3, ["ab", "", "c"], problem=["x", "y", "z"], solution=[1, 2, 3], flag=True)
    assert got == [1.0, -1.0, 3.0] and seen["solution"] == [1, 3]
    ids = text_context(None, "abx", {}).prompt_ids
    plain = model.generate(ids[None], do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert seen["texts"][0] == " ".join(map(str, plain[0, len(ids) :].tolist()))
    assert second.texts[1] is None
    assert second(["q"], [""], problem=["x"], solution=[1]) == [-1.0]


def test_second_pass_binds_the_trainers_policy():
    model = models.tiny_model("llama")

    class Accelerator:
        def unwrap_model(self, m):
            return m

    trainer = type("Trainer", (), {"model": model, "accelerator": Accelerator()})
    second = judges.SecondPass(lambda c, r: None, lambda **k: [], str)
    with pytest.raises(InputError, match="bound"):
        second(["q"], ["a"])
    second.bind(trainer)
    assert second.model is model
