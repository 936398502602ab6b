# SPDX-License-Identifier: Apache-2.0
"""Images inside a completion, returned by a tool: exact for the Qwen-VL families."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo import models
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

CORE = ("qwen2_5_vl", "qwen3_5")
SERVED = [
    pytest.param(name, marks=() if name in CORE else pytest.mark.slow)
    for name, family in models.families().items()
    if family.serves_images_in_completions
]


def case(model):
    """Two prompts, of text and with an image, whose second completions were shown another."""
    family = models.families()[model.config.model_type]
    groups = tm.synthetic_groups(model, [([(4, 6)], 5, [4, 3]), ([], 3, [2, 5])])
    for group, shown in zip(groups, ([(6, 8)], [(4, 4), (4, 6)]), strict=True):
        (seen,) = tm.synthetic_groups(model, [(shown, 2, [])], seed=len(shown))
        group.completions[1] = torch.cat([seen.prompt_ids, group.completions[1]])
        group.completion_vision = [{}, seen.vision]
        assert family.has_images(seen.vision)
    return groups


def plain(model, groups):
    """Log-probs from one forward a completion, given its prompt's images and its own; those of
    placeholders are 0."""
    family, rows = models.families()[model.config.model_type], []
    for group in groups:
        row = []
        for c, completion in enumerate(group.completions):
            shown = [vision for vision in (group.vision, group.vision_of(c)) if vision]
            vision = family.join_images(shown) if shown else {}
            logits = tm.naive_logits(model, fg.Group(group.prompt_ids, [], vision), completion)
            logp = torch.log_softmax(logits, -1).gather(-1, completion[:, None])[:, 0]
            placeholder = torch.isin(completion, torch.tensor(models.Adapter(model).placeholders))
            row.append(logp.masked_fill(placeholder, 0.0))
        rows.append(row)
    return rows


@pytest.mark.parametrize("family", SERVED)
def test_equals_one_by_one(family, record_property):
    worst = 0.0
    with tm.float64_norms():
        model = tm.tiny_model(family, torch.float64)
        groups = case(model)
        weights = tm.random_weights(groups)
        want = plain(model, groups)
        tm.weighted_sum(want, weights).backward()
        want_grads = tm.take_grads(model)
        for budget in (None, max(g.prompt_ids.numel() + max(g.lengths) for g in groups)):
            scores = fg.score(model, groups, self_check=False, max_tokens=budget)
            for score, row in zip(scores, want, strict=True):
                for ours, theirs in zip(score.logp, row, strict=True):
                    worst = max(worst, float((ours - theirs).detach().abs().max()))
            tm.weighted_sum([s.logp for s in scores], weights).backward()
            worst = max(worst, tm.grad_error(tm.take_grads(model), want_grads)[0])
    record_property("worst", worst)
    assert worst <= 1e-12


def test_an_image_shown_to_one_completion_changes_no_other():
    model = tm.tiny_model("qwen2_5_vl")
    groups = case(model)
    with torch.no_grad():
        before = fg.score(model, groups, self_check=False)
        pixels = groups[0].completion_vision[1]["pixel_values"]
        groups[0].completion_vision[1]["pixel_values"] = pixels.flip(0)
        after = fg.score(model, groups, self_check=False)
    for g, (old, new) in enumerate(zip(before, after, strict=True)):
        for c, (a, b) in enumerate(zip(old.logp, new.logp, strict=True)):
            assert torch.equal(a, b) != ((g, c) == (0, 1))


def test_refusals():
    model = tm.tiny_model("qwen2_5_vl")
    (group, _) = case(model)
    group.completion_vision[1] = group.vision
    with pytest.raises(fg.InputError, match=r"completions\[1\] has 12 tokens in runs \[12\]"):
        fg.score(model, [group], self_check=False)
    with pytest.raises(fg.InputError, match="completion_vision has 1 entries for 2 completions"):
        fg.Group(group.prompt_ids, group.completions, group.vision, completion_vision=[{}])
    other = tm.tiny_model("llava")
    (prompt,) = tm.synthetic_groups(other, [([None], 2, [3])])
    prompt.completion_vision = [prompt.vision]
    with pytest.raises(fg.InputError, match="inside a completion are not served for family 'llava"):
        fg.score(other, [prompt], self_check=False)
