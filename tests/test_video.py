# SPDX-License-Identifier: Apache-2.0
"""Videos of the Qwen-VL families: exact, encoded once, and sampled at the positions they train."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo import models
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

VIDEO = [name for name, family in models.families().items() if family.video_inputs]
CORE = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
FAMILIES = [pytest.param(f, marks=() if f in CORE else pytest.mark.slow) for f in VIDEO]
# (images, text, completions, videos): a video alone, beside an image, two of them, and none. The
# second is longer in time than wide, so that its last frame lies beyond the text after it.
SPECS = (
    ([], 5, [7, 1, 4], [(3, 4, 6)]),
    ([(4, 6)], 3, [5, 2], [(5, 4, 4)]),
    ([], 4, [3], [(2, 4, 4), (3, 6, 4)]),
    ([(6, 6)], 2, [4, 6]),
)


def case(family, dtype=torch.float32):
    model = tm.tiny_model(family, dtype)
    groups = tm.synthetic_groups(model, SPECS)
    if models.families()[family].position_inputs:  # half seconds, which 5.17 cuts
        for group, seconds in zip(groups, ([1.5], [2.0], [0.5, 1.0]), strict=False):
            group.vision["second_per_grid_ts"] = torch.tensor(seconds)
    return model, groups


def errors(model, groups, want, want_grads, **options):
    logp = [s.logp for s in fg.score(model, groups, self_check=False, **options)]
    tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    worst = max(
        float((ours - theirs).detach().abs().max())
        for row, plain in zip(logp, want, strict=True)
        for ours, theirs in zip(row, plain, strict=True)
    )
    return worst, tm.grad_error(tm.take_grads(model), want_grads)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_equal_one_by_one(family, record_property):
    with tm.float64_norms():
        model, groups = case(family, torch.float64)
        want = tm.naive_logp(model, groups)
        tm.weighted_sum(want, tm.random_weights(groups)).backward()
        grads = tm.take_grads(model)
        tight = max(g.prompt_ids.numel() + max(g.lengths) for g in groups)
        found = [errors(model, groups, want, grads, max_tokens=n) for n in (None, tight)]
    worst = max(map(max, found))
    record_property("worst", worst)
    assert worst <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_in_several_prompts_is_encoded_once(family):
    """By one call of the tower, and once more for the images beside it; a step's gradients are
    those of the plain loss."""
    model, groups = case(family)
    same = fg.Group(groups[0].prompt_ids.flip(0), [torch.tensor([5, 6])], groups[0].vision)
    seen = []
    tower = models.families()[family].tower(model)
    tower.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    with torch.no_grad():
        fg.score(model, [*groups, same], self_check=False)
    assert len(seen) == 2  # the images, the videos
    advantages = [torch.linspace(-1, 1, len(g.lengths)) for g in groups[:2]]
    for group, values in zip(groups[:2], advantages, strict=True):
        group.advantages = values
    fg.GRPOStep(model, fg.Objective(), max_tokens=60)(groups[:2])
    ours = tm.take_grads(model)
    logp = tm.naive_logp(model, groups[:2])
    tokens = sum(sum(g.lengths) for g in groups[:2])
    weights = [[a.expand(len(lp)) for a, lp in zip(v, row, strict=True)]
               for v, row in zip(advantages, logp, strict=True)]  # fmt: skip
    (-tm.weighted_sum(logp, weights) / tokens).backward()
    assert tm.grad_error(ours, tm.take_grads(model))[0] <= 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rollout_is_that_of_whole_forwards(family):
    """`model.generate` goes on after a video's last frame, where the forward that trains goes on
    after its text: the rollout takes the positions that are trained."""
    model, groups = case(family)
    groups = [fg.Group(g.prompt_ids, [], g.vision) for g in groups]
    for group in fg.generate(model, groups, 2, max_new_tokens=5, temperature=0.0, eos_token_id=()):
        completion = group.completions[0]
        with torch.no_grad():
            logits = tm.naive_logits(model, group, completion)
        logits[:, list(models.Adapter(model).placeholders)] = -torch.inf
        assert logits.argmax(-1).tolist() == completion.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_refused(family):
    model, groups = case(family)
    group = groups[0]

    def refused(match, **changes):
        vision = {k: v for k, v in (group.vision | changes).items() if v is not None}
        bad = fg.Group(group.prompt_ids, group.completions, vision, sample_id="s7")
        with pytest.raises(fg.InputError, match=f"sample 's7'.*{match}"):
            fg.score(model, [bad])

    refused("18 video tokens, vision has no videos", pixel_values_videos=None, video_grid_thw=None)
    refused("vision lacks 'video_grid_thw'", video_grid_thw=None)
    refused("video tokens and video features do not match.*18 tokens in runs .*, vision has ",
            video_grid_thw=torch.tensor([[2, 4, 6]]),
            pixel_values_videos=group.vision["pixel_values_videos"][:48])  # fmt: skip
    refused("counts 72 patches, pixel_values_videos has 71",
            pixel_values_videos=group.vision["pixel_values_videos"][:-1])  # fmt: skip
