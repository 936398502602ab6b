# SPDX-License-Identifier: Apache-2.0
"""What a packed row promises of hostile samples, over all families: the values of one sample at a
time, or an error that names the sample, its tokens and its features."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastgrpo as fg
from fastgrpo import models
from fastgrpo.testing import models as tm
from fastgrpo.testing.processors import tiny_processor

pytestmark = pytest.mark.engine

# Every case of the list, and the tests that show it.
CASES = {
    "no image, one, many": "test_values",
    "text rows beside rows with images": "test_values",
    "several images in a prompt": "test_values",
    "video": "test_video.py::test_videos_equal_one_by_one",
    "an image of one pixel": "test_pictures_of_any_size",
    "an image of 1 x 20000": "test_pictures_of_any_size",
    "fewest pixels": "test_pictures_of_any_size",
    "most pixels": "test_pictures_of_any_size",
    "image id inside a completion": "test_errors",
    "prompt cut inside image tokens": "test_errors",
    "grid and pixels that disagree": "test_packing.py::test_grid_and_pixels_that_disagree",
    "an image too many": "test_errors",
    "an image missing": "test_errors",
    "left and right padding": "test_trl_rows.py::test_rows_are_cut_by_the_mask_not_by_the_pad_id",
    "pad is eos": "test_trl_rows.py::test_rows_are_cut_by_the_mask_not_by_the_pad_id",
    "a sample longer than the budget": "test_errors",
    "an empty completion": "test_values",
    "a completion of one token": "test_values",
    "isolation by perturbation": "test_families.py::test_a_completion_changes_no_other",
    "order permuted": "test_family_controls.py::test_order_changes_nothing",
    "positions of three rows and four": (
        "test_score.py::test_negative_control_packing_inferred_by_transformers"
    ),
    "positions that start again": "test_family_controls.py::test_the_fault_shows",
    "cu_seqlens beyond int32": "test_packing.py::test_layout_with_more_keys_than_int32_is_refused",
    "sliding window": "test_family_controls.py::test_the_fault_shows",
    "linear attention": "test_recurrence.py::test_both_routes_are_exact",
    "images that see both ways": "test_families.py::test_images_that_see_both_ways_need_it",
    "token_type_ids": "test_trl_families.py::test_same_numbers_as_trl",
    "gradients of the tower in mixed batches": "test_families.py::test_packed_equals_one_by_one",
    "prompts shared or not": "test_values",
    "deepstack features": "test_families.py::test_packed_equals_one_by_one",
    "512 tiny samples": "test_values",
    "one huge and 511 tiny": "test_packing.py::test_plan_one_huge_and_many_tiny",
    "images of different dtypes": (
        "test_packing.py::test_images_of_another_dtype_are_cast_as_the_model_does"
    ),
    "one image object twice": "test_values",
    "a processor without a grid": "test_pictures_of_any_size",
    "a slow processor": "test_pictures_of_any_size",
    "a layer that is neither": "test_score_refusals.py::test_hybrid_layers",
    "ids outside the vocabulary": "test_errors",
}
CORE = ("gemma4", "internvl", "qwen2_5_vl", "qwen3_5", "smolvlm")
EVERY, PICTURED = (
    [pytest.param(f, marks=() if f in CORE else pytest.mark.slow) for f in names]
    for names in (tm.FAMILIES, tm.VLM_FAMILIES)
)


def test_every_case_has_its_test():
    here = Path(__file__)
    for case, where in CASES.items():
        file, _, name = where.rpartition("::")
        source = here.with_name(file) if file else here
        assert re.search(rf"^def {name}\(", source.read_text(), re.M), case
    assert len(CASES) == 38


def assert_values(model, groups, **options):
    """The values of one sample at a time, within 1e-5."""
    with torch.no_grad():
        scores = fg.score(model, groups, self_check=False, **options)
        want = tm.naive_logp(model, groups)
    for score, row in zip(scores, want, strict=True):
        for ours, theirs in zip(score.logp, row, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_values(family):
    model = tm.tiny_model(family)
    mixed = tm.synthetic_groups(
        model, [([(4, 6)], 5, [1, 0, 6]), ([(4, 4)] * 3, 2, [4]), ([], 3, [2, 0])]
    )
    first = mixed[0]
    same = fg.Group(first.prompt_ids, [torch.tensor([5, 6, 7])], first.vision)
    apart = [fg.Group(first.prompt_ids, [c], first.vision) for c in first.completions]
    tiny = [fg.Group(torch.tensor([i % 90]), [torch.tensor([i % 89])]) for i in range(512)]
    assert_values(model, [*mixed, same])
    assert_values(model, apart)
    with torch.no_grad():  # one forward of 512 plain samples, not 512 forwards
        ids = torch.stack([torch.cat([g.prompt_ids, g.completions[0]]) for g in tiny])
        given = models.families()[family].stock_inputs(model.config, ids, {}, 1)
        logits = model(input_ids=ids, use_cache=False, **given).logits[:, 0]
        want = torch.log_softmax(logits.float(), -1).gather(1, ids[:, 1:])[:, 0]
        got = torch.cat([s.logp[0] for s in fg.score(model, tiny, self_check=False)])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def without_last_image_token(group, token):
    last = int((group.prompt_ids == token).nonzero()[-1])
    return torch.cat([group.prompt_ids[:last], group.prompt_ids[last + 1 :]])


@pytest.mark.parametrize("family", EVERY)
def test_errors(family):
    """Each names the sample and what is wrong with it."""
    model = tm.tiny_model(family)
    (group,) = tm.synthetic_groups(model, [([(4, 6)], 5, [3, 2])])

    def refused(match, prompt=group.prompt_ids, completions=group.completions, **options):
        vision = options.pop("vision", group.vision)
        bad = fg.Group(prompt, completions, vision, sample_id="s7")
        with pytest.raises(fg.InputError, match=f"sample 's7'.*{match}"):
            fg.score(model, [bad], self_check=False, **options)

    refused("completions.0. has an id outside", completions=[torch.tensor([10**6])])
    refused("tokens exceed max_tokens=4", max_tokens=4)
    if family not in tm.VLM_FAMILIES:
        return
    image = models.Adapter(model).placeholders[0]
    tokens = int((group.prompt_ids == image).sum())
    refused("completions.0. has the image or video placeholder .* at token 1",
            completions=[torch.tensor([5, image])])  # fmt: skip
    refused(f"has {tokens - 1} tokens .*vision has {tokens} features",
            prompt=without_last_image_token(group, image))  # fmt: skip
    refused(f"has {tokens} image tokens, vision has no images", vision={})
    parts = models.families()[family].split_images(group.vision)
    twice = models.families()[family].join_images(parts * 2)
    refused(f"has {tokens} tokens .*vision has {2 * tokens} features", vision=twice)


SIZES = {"one pixel": (1, 1), "few": (4, 4), "many": (300, 200), "line": (20000, 1)}


@pytest.mark.parametrize("family", PICTURED)
def test_pictures_of_any_size(family):
    """Through the family's own image processor, which may refuse a line of pixels itself."""
    model = tm.tiny_model(family)
    processor = tiny_processor(model.config)
    groups = []
    for name, size in SIZES.items():
        picture = Image.radial_gradient("L").convert("RGB").resize(size)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "7?"}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        try:
            inputs = processor(images=[[picture]], text=[text], return_tensors="pt")
        except (ValueError, ZeroDivisionError):
            assert name == "line"
            continue
        vision = {k: inputs[k] for k in models.families()[family].vision_inputs}
        groups.append(fg.Group(inputs["input_ids"][0], [torch.tensor([5, 6])], vision))
    assert_values(model, groups)
