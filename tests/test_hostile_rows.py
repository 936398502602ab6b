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

VALUES = "the values of one sample at a time"
ERROR = "an error that names the sample, its tokens and its features"
EITHER = f"{VALUES}, or {ERROR}"
ALL, PICTURES, ONE = "every family", "every family with images", "not a matter of the family"

# Every case of the list: what is promised, of which families, and the test that shows it.
CASES = {
    "no image, one, many": (VALUES, ALL, "test_values"),
    "text rows beside rows with images": (VALUES, ALL, "test_values"),
    "several images in a prompt": (VALUES, ALL, "test_values"),
    "video": (VALUES, "families with videos", "test_video.py::test_videos_equal_one_by_one"),
    "an image of one pixel": (VALUES, PICTURES, "test_pictures_of_any_size"),
    "an image of 1 x 20000": (EITHER, PICTURES, "test_pictures_of_any_size"),
    "fewest pixels": (VALUES, PICTURES, "test_pictures_of_any_size"),
    "most pixels": (VALUES, PICTURES, "test_pictures_of_any_size"),
    "image id inside a completion": (ERROR, ALL, "test_errors"),
    "prompt cut inside image tokens": (ERROR, ALL, "test_errors"),
    "sizes and pixels that disagree": (ERROR, PICTURES, "test_vision_that_disagrees"),
    "an image too many": (ERROR, ALL, "test_errors"),
    "an image missing": (ERROR, ALL, "test_errors"),
    "left and right padding": (VALUES, PICTURES, "test_padded_batches"),
    "pad is eos": (VALUES, PICTURES, "test_padded_batches"),
    "a sample longer than the budget": (ERROR, ALL, "test_errors"),
    "an empty completion": (VALUES, ALL, "test_values"),
    "a completion of one token": (VALUES, ALL, "test_values"),
    "isolation by perturbation": (
        "every other log-prob bit for bit",
        ALL,
        "test_families.py::test_a_completion_changes_no_other",
    ),
    "order permuted": (VALUES, ALL, "test_family_controls.py::test_order_changes_nothing"),
    "positions of three rows and four": (
        VALUES,
        ONE,
        "test_score.py::test_negative_control_packing_inferred_by_transformers",
    ),
    "positions that start again": (VALUES, ALL, "test_family_controls.py::test_the_fault_shows"),
    "cu_seqlens beyond int32": (
        ERROR,
        ONE,
        "test_packing.py::test_layout_with_more_keys_than_int32_is_refused",
    ),
    "sliding window": (VALUES, ALL, "test_family_controls.py::test_the_fault_shows"),
    "linear attention": (VALUES, ALL, "test_family_controls.py::test_the_fault_shows"),
    "images that see both ways": (VALUES, ALL, "test_family_controls.py::test_the_fault_shows"),
    "token_type_ids": (VALUES, PICTURES, "test_padded_batches"),
    "gradients of the tower in mixed batches": (
        VALUES,
        ALL,
        "test_families.py::test_packed_equals_one_by_one",
    ),
    "prompts shared or not": (VALUES, ALL, "test_values"),
    "deepstack features": (VALUES, ALL, "test_families.py::test_packed_equals_one_by_one"),
    "512 tiny samples": (VALUES, ALL, "test_values"),
    "one huge and 511 tiny": (VALUES, ALL, "test_values"),
    "images of different dtypes": (EITHER, PICTURES, "test_images_of_different_dtypes"),
    "one image object twice": (VALUES, PICTURES, "test_padded_batches"),
    "a processor without a grid": (VALUES, PICTURES, "test_padded_batches"),
    "a slow processor": (VALUES, PICTURES, "test_pictures_of_any_size"),
    "a layer that is neither": (ERROR, ONE, "test_score_refusals.py::test_hybrid_layers"),
    "ids outside the vocabulary": (ERROR, ALL, "test_errors"),
}
CORE = ("gemma4", "internvl", "qwen2_5_vl", "qwen3_5", "smolvlm")
EVERY, PICTURED = (
    [pytest.param(f, marks=() if f in CORE else pytest.mark.slow) for f in names]
    for names in (tm.FAMILIES, tm.VLM_FAMILIES)
)


def test_every_case_has_its_test():
    """Of the families it is said to be of: the test's first parameter is the family."""
    here = Path(__file__)
    for case, (_, families, where) in CASES.items():
        file, _, name = where.rpartition("::")
        source = here.with_name(file) if file else here
        marks = r'@pytest.mark.parametrize\("family.*\n(?:@.*\n)*' if families is not ONE else ""
        assert re.search(rf"^{marks}def {name}\(", source.read_text(), re.M), case
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
    assert_values(model, apart)  # one prompt
    longest = first.prompt_ids.numel() + max(first.lengths)
    assert_values(model, apart, max_tokens=longest)  # one for each
    with torch.no_grad():  # one forward of 512 plain samples, not 512 forwards
        ids = torch.stack([torch.cat([g.prompt_ids, g.completions[0]]) for g in tiny])
        given = models.families()[family].stock_inputs(model.config, ids, {}, 1)
        logits = model(input_ids=ids, use_cache=False, **given).logits[:, 0]
        want = torch.log_softmax(logits.float(), -1).gather(1, ids[:, 1:])[:, 0]
        got = torch.cat([s.logp[0] for s in fg.score(model, tiny, self_check=False)])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    huge = fg.Group(first.prompt_ids, [torch.arange(200) % 90], first.vision)
    with torch.no_grad():
        beside = fg.score(model, [huge, *tiny[1:]], self_check=False, max_tokens=300)
    torch.testing.assert_close(
        torch.cat([s.logp[0] for s in beside[1:]]), want[1:], atol=1e-5, rtol=1e-5
    )
    (alone,) = tm.naive_logp(model, [huge])
    torch.testing.assert_close(beside[0].logp[0], alone[0].detach(), atol=1e-5, rtol=1e-5)


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
    for placeholder in models.Adapter(model).placeholders:
        refused("completions.0. has the image or video placeholder .* at token 1",
                completions=[torch.tensor([5, placeholder])])  # fmt: skip
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
    with torch.no_grad():
        together = fg.score(model, groups, self_check=False)
        for group, beside in zip(groups, together, strict=True):
            (alone,) = fg.score(model, [group], self_check=False)
            want = plain_logp(model, group)
            for score in (alone, beside):
                torch.testing.assert_close(score.logp[0], want, atol=1e-5, rtol=1e-5)


def plain_logp(model, group):
    """Of a picture that the stock model cannot encode alone, with another behind the completion,
    which does not see it."""
    family, (completion,) = models.families()[model.config.model_type], group.completions
    images = family.split_images(group.vision)
    more = family.company(model.config, images)
    behind = [token for image in more for token in family.image_text(image, model.config)]
    both = fg.Group(group.prompt_ids, [], family.join_images([*images, *more]))
    longer = torch.cat([completion, torch.tensor(behind, dtype=torch.int64)])
    logits = tm.naive_logits(model, both, longer)[: len(completion)]
    return torch.log_softmax(logits, -1).gather(-1, completion[:, None])[:, 0]


@pytest.mark.parametrize("family", PICTURED)
def test_vision_that_disagrees(family):
    """A processor's outputs that do not fit one another, whichever is too short."""
    model = tm.tiny_model(family)
    (group,) = tm.synthetic_groups(model, [([(4, 6), (4, 4)], 5, [3, 2])])
    for key, value in group.vision.items():
        for cut in (value[:-1], value[:0], value[None]):
            bad = fg.Group(
                group.prompt_ids, group.completions, group.vision | {key: cut}, sample_id="s7"
            )
            with pytest.raises(fg.InputError, match="sample 's7'"):
                fg.score(model, [bad], self_check=False)


@pytest.mark.parametrize("family", PICTURED)
def test_images_of_different_dtypes(family):
    """Each is cast as the model casts it; Gemma 4 computes in an image's own dtype first."""
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model, [([(4, 6)], 5, [3]), ([(4, 4)], 4, [2])])
    for group, dtype in zip(groups, (torch.float64, torch.bfloat16), strict=True):
        group.vision["pixel_values"] = group.vision["pixel_values"].to(dtype)
        assert_values(model, [group])
    if family == "gemma4":
        with pytest.raises(fg.InputError, match="pixel_values .*bfloat16.*float64"):
            fg.score(model, groups, self_check=False)
    else:
        assert_values(model, groups)


@pytest.mark.parametrize("family", PICTURED)
@pytest.mark.parametrize("side", ("left", "right"))
def test_padded_batches(family, side):
    """What a processor makes of several prompts at once is cut into what it makes of each."""
    pytest.importorskip("trl")
    from fastgrpo.integrations.trl.rows import TYPE_FIELDS, as_groups, read_rows

    model = tm.tiny_model(family)
    kind = models.families()[family]
    processor = tiny_processor(model.config, pad_is_eos=True)
    processor.tokenizer.padding_side = side
    picture = Image.radial_gradient("L").convert("RGB").resize((24, 16))
    given = [[picture], [picture, picture.rotate(37).resize((16, 32))], [picture, picture]]

    def process(chosen):
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}] * len(images)
                  + [{"type": "text", "text": "7" * len(images)}]}]
            )  # ends with the end of a turn, which is the padding too
            for images in chosen
        ]  # fmt: skip
        return processor(images=chosen, text=texts, padding=True, return_tensors="pt")

    completions = torch.tensor(
        [[5, 6, processor.tokenizer.pad_token_id, 7], [8, 0, 0, 0], [9, 8, 0, 0]]
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    batch = process(given)
    fields = {k: batch[k] for k in (*kind.media_inputs, *kind.count_inputs) if k in batch}
    types = {k: torch.cat([batch[k], 0 * completions], 1) for k in TYPE_FIELDS if k in batch}
    prompts = [
        p[m.bool()] for p, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    counts = kind.image_counts(model.config, [p.tolist() for p in prompts], fields, [1, 2, 2])
    rows = read_rows(
        torch.cat([batch["input_ids"], completions], 1),
        torch.cat([batch["attention_mask"], mask], 1),
        4,
        kind,
        fields,
        num_images=counts,
        **types,
    )
    groups = as_groups(rows, [0, 1, 2])
    for group, images, completion, keep in zip(groups, given, completions, mask, strict=True):
        one = process([images])
        vision = {k: one[k] for k in kind.media_inputs if k in one}
        alone = fg.Group(one["input_ids"][0], [completion[keep.bool()]], vision)
        assert torch.equal(group.prompt_ids, alone.prompt_ids)
        with torch.no_grad():
            (score,) = fg.score(model, [group], self_check=False)
            ((want,),) = tm.naive_logp(model, [alone])
        torch.testing.assert_close(score.logp[0], want, atol=1e-5, rtol=1e-5)
    assert_values(model, groups)
