# SPDX-License-Identifier: Apache-2.0
"""GroupLayout's tables, the planner, and every check on what a group may hold."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo.models.join import join
from fastgrpo.packing import GroupLayout, plan_rows, regroup
from fastgrpo.packing.host import first_equal, nobody_writes_to
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

ROWS = ([(3, [2, 0, 1])], [(1, [1]), (4, [3, 3]), (2, [])], [(5, [])])


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("lengths", ROWS)
def test_layout_tables_agree_with_a_direct_construction(lengths):
    layout = GroupLayout(lengths)
    segments, keys, predicting = [], [], []
    offset = 0
    for prompt, completions in lengths:
        p0, p1 = offset, offset + prompt
        segments.append((p0, p1, p0, p0))
        keys.append(list(range(p0, p1)))
        offset = p1
        for length in completions:
            segments.append((offset, offset + length, p0, p1))
            own = list(range(offset, offset + length))
            keys.append(list(range(p0, p1)) + own)
            predicting += [p1 - 1, *own[:-1]][:length]
            offset += length
    assert layout.segments == segments and layout.total == offset
    assert layout.kv_index.tolist() == sum(keys, [])
    assert layout.cu_k.tolist() == torch.tensor([0, *map(len, keys)]).cumsum(0).tolist()
    assert layout.cu_q.tolist() == [0] + [s[1] for s in segments]
    assert layout.max_q == max(b - a for a, b, _, _ in segments)
    assert layout.max_k == max(map(len, keys))
    index, order, first = layout.predictors()
    assert index is layout.pred_index and len(first) == len(layout.keep_rows) + 1
    for row in range(len(layout.keep_rows)):
        reads = (index == row).nonzero()[:, 0].tolist()
        assert order[first[row] : first[row + 1]].tolist() == reads
    assert layout.keep_rows[layout.pred_index].tolist() == predicting
    assert layout.keep_rows.tolist() == sorted(set(predicting))
    mask, (_, _, _, text_pos) = layout.dense_mask(), layout.token_tables()
    for (start, end, p0, p1), key in zip(segments, keys, strict=True):
        for row in range(start, end):
            assert mask[row].nonzero()[:, 0].tolist() == [k for k in key if k <= row]
            assert int(text_pos[row]) == row - start + p1 - p0
    assert layout.cu_q.dtype == layout.cu_k.dtype == torch.int32
    assert layout.kv_index.dtype == torch.int64


def test_layout_is_left_alone_by_fsdp_argument_casting():
    from torch.distributed.utils import _apply_to_tensors

    layout = GroupLayout([(3, [2])])
    assert _apply_to_tensors(lambda t: t.double(), {"fg_layout": layout})["fg_layout"] is layout
    assert not hasattr(layout, "__dict__")


def test_layout_with_more_keys_than_int32_is_refused():
    with pytest.raises(fg.InputError, match=r"2\^31"):
        # 2^16 completions of a prompt of 2^15 tokens; the tables must not be built to find out
        GroupLayout([(2**15, [1] * 2**16)])


# ---------------------------------------------------------------- planner


def group(prompt, lengths, **kwargs):
    return fg.Group(ids(*prompt), [ids(*range(n)) for n in lengths], **kwargs)


def test_regroup_merges_equal_prompts_in_any_order():
    a, b = group([1, 2, 3], [2]), group([1, 2, 4], [1, 5])
    parts = regroup([a, b, group([1, 2, 3], [4, 0, 3])])
    assert [p.members for p in parts] == [[(0, 0), (2, 0), (2, 2)], [(1, 0), (1, 1)]]
    assert [p.tokens for p in parts] == [3 + 9, 3 + 6]
    assert regroup([a, b], skip={(1, 0), (1, 1)})[-1].group is a


def test_regroup_tells_images_apart():
    pixels = torch.arange(8.0).view(4, 2)
    grid = torch.tensor([[1, 2, 2]])

    def with_image(pixels):
        return group([1], [1], vision={"pixel_values": pixels, "image_grid_thw": grid})

    same_sum = pixels.flip(0)
    parts = regroup([with_image(pixels), with_image(same_sum), with_image(pixels.clone())])
    assert [p.members for p in parts] == [[(0, 0), (2, 0)], [(1, 0)]]
    assert len(regroup([with_image(pixels), with_image(pixels.half()), group([1], [1])])) == 3


def test_plan_keeps_groups_whole_and_within_the_budget():
    groups = [group(range(g, g + 5), [3, 3]) for g in range(7)]
    parts = regroup(groups)
    rows = plan_rows(parts, 24)
    assert [len(row) for row in rows] == [2, 2, 2, 1]
    assert sorted(m for row in rows for p in row for m in p.members) == sorted(
        m for p in parts for m in p.members
    )
    assert rows == plan_rows(parts, 24)  # deterministic
    assert len(plan_rows(parts)) == 1


def test_plan_splits_a_group_only_when_it_must():
    parts = regroup([group([1, 2, 3, 4], [5, 5, 5, 2]), group([9], [2])])
    rows = plan_rows(parts, 14)
    assert [[p.members for p in row] for row in rows] == [
        [[(0, 0), (0, 1)]],
        [[(0, 2), (0, 3)], [(1, 0)]],
    ]
    assert all(sum(p.tokens for p in row) <= 14 for row in rows)


def test_plan_one_huge_and_many_tiny():
    groups = [group([7] * 300, [200])] + [group([1, g], [1]) for g in range(511)]
    rows = plan_rows(regroup(groups), 512)
    assert len(rows) == 4 and sum(len(row) for row in rows) == 512


def test_sample_longer_than_the_budget_is_named():
    parts = regroup([group([1], [1]), group([1, 2, 3], [2, 9], sample_id="img-7")])
    message = r"'img-7' \(group 1, completion 1\): prompt of 3 and completion of 9 .*max_tokens=8"
    with pytest.raises(fg.InputError, match=message):
        plan_rows(parts, 8)
    with pytest.raises(fg.InputError, match="max_tokens must be at least 1"):
        plan_rows(parts, 0)
    assert len(plan_rows(regroup([group([1] * 20000, [5])]))) == 1  # no budget given: it runs


# ---------------------------------------------------------------- what a group may hold


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompt_ids=ids()), "prompt_ids is empty"),
        (dict(prompt_ids=ids(1, 2)[None]), r"prompt_ids must be a 1-D int64 .*\(1, 2\)"),
        (dict(prompt_ids=torch.tensor([1.0])), "prompt_ids must be a 1-D int64 .*float32"),
        (dict(prompt_ids=[1, 2]), "prompt_ids must be a 1-D int64 tensor, got list"),
        (dict(completions=[ids(1), ids(1).int()]), r"completions\[1\] must be .*int32"),
        (dict(vision=None), "vision must be a dict of the processor's outputs.*got NoneType"),
        (dict(completion_vision=[{}, None]), r"completion_vision\[1\] must be a dict"),
        (dict(vision={"pixel_values": [1]}), r"vision\['pixel_values'\] must be a tensor"),
        (dict(advantages=torch.zeros(3)), r"advantages must be .*\(2,\), one per .*\(3,\)"),
        (dict(advantages=[0.0, 1.0]), r"advantages must be a tensor of shape \(2,\) or a list"),
        (dict(advantages=[torch.zeros(2), torch.zeros(3)]), r"advantages\[1\] must have shape"),
        (dict(advantages=torch.tensor([1.0, float("nan")])), r"advantages\[1\] is not finite"),
        (dict(advantages=torch.tensor([float("inf"), 1.0])), r"advantages\[0\] is not finite"),
        (dict(old_logp=torch.zeros(2)), "old_logp must be a list"),
        (dict(old_logp=[torch.zeros(2)]), "old_logp has 1 entries for 2 completions"),
        (dict(ref_logp=[torch.zeros(2), torch.zeros(2)]), r"ref_logp\[1\] must have shape \(1,\)"),
        (dict(rollout_logp=[ids(1, 2), ids(1)]), r"rollout_logp\[0\] must be floating"),
        (dict(mask=[torch.ones(2), torch.ones(2)]), r"mask\[1\] must have shape \(1,\)"),
    ],
)
def test_group_names_what_is_wrong(change, message):
    good = dict(prompt_ids=ids(1, 2, 3), completions=[ids(4, 5), ids(6)], sample_id=17)
    with pytest.raises(fg.InputError, match="sample 17: .*" + message):
        fg.Group(**(good | change))


def vlm_case(**change):
    model = tm.tiny_model("qwen2_5_vl")
    (g,) = tm.synthetic_groups(model, [(((4, 6), (8, 8)), 3, (4, 2))])
    fields = dict(prompt_ids=g.prompt_ids, completions=g.completions, vision=dict(g.vision))
    return model, fg.Group(**(fields | dict(sample_id="s1") | change)), g


def refused(model, group, message, **options):
    for self_check in (True, False):
        with pytest.raises(fg.InputError, match=message):
            fg.score(model, [group], self_check=self_check, **options)


def test_prompt_cut_inside_an_image():
    model, _, good = vlm_case()
    cut = fg.Group(good.prompt_ids[2 + 4 :], good.completions, good.vision, sample_id="s1")
    message = r"sample 's1': image tokens and image features do not match: .*\[4, 16\].*\[6, 16\]"
    refused(model, cut, message)


def test_missing_and_extra_images():
    _, _, good = vlm_case()
    first = {
        "pixel_values": good.vision["pixel_values"][:24],
        "image_grid_thw": good.vision["image_grid_thw"][:1],
    }
    model, one_missing, _ = vlm_case(vision=first)
    refused(model, one_missing, r"22 tokens in runs \[6, 16\], vision has 6 features \[6\]")
    model, none, _ = vlm_case(vision={})
    refused(model, none, "prompt_ids has 22 image tokens, vision has no images")
    model, extra, _ = vlm_case(prompt_ids=ids(1, 2, 3))
    refused(model, extra, r"0 tokens in runs \[\], vision has 22 features")
    swapped = dict(good.vision, image_grid_thw=good.vision["image_grid_thw"].flip(0))
    model, wrong_order, _ = vlm_case(vision=swapped)
    refused(model, wrong_order, r"runs \[6, 16\], vision has 22 features \[16, 6\]")


def test_grid_and_pixels_that_disagree():
    _, _, good = vlm_case()
    model, g, _ = vlm_case(vision=dict(good.vision, pixel_values=good.vision["pixel_values"][:-1]))
    refused(model, g, "image_grid_thw counts 88 patches, pixel_values has 87")
    model, g, _ = vlm_case(vision=dict(good.vision, image_grid_thw=torch.tensor([1, 4, 6])))
    refused(model, g, "image_grid_thw must be")
    model, g, _ = vlm_case(vision={"pixel_values": good.vision["pixel_values"]})
    refused(model, g, "vision lacks 'image_grid_thw'")


def test_unknown_vision_inputs_and_videos():
    _, _, good = vlm_case()
    model, g, _ = vlm_case(vision=dict(good.vision, image_sizes=torch.ones(2)))
    refused(model, g, r"vision\['image_sizes'\] is not understood")
    model, g, _ = vlm_case(vision=dict(good.vision, pixel_values_videos=torch.ones(2)))
    refused(model, g, "vision lacks 'video_grid_thw'")
    model, g, _ = vlm_case(prompt_ids=torch.cat([good.prompt_ids, ids(tm.VIDEO_ID)]))
    refused(model, g, "1 video tokens, vision has no videos")
    glm = tm.tiny_model("glm4v")
    refused(glm, g, "video placeholders; videos are not served")
    _, g, _ = vlm_case()
    refused(tm.tiny_model("qwen2"), g, "images given to text model 'qwen2'")


@pytest.mark.parametrize("token", (tm.IMAGE_ID, tm.VIDEO_ID))
def test_placeholder_inside_a_completion(token):
    _, _, good = vlm_case()
    completions = [ids(5, token, 6, 7), good.completions[1]]
    model, g, _ = vlm_case(completions=completions, advantages=torch.tensor([1.0, -1.0]))
    refused(model, g, rf"'s1': completions\[0\] has the image or video .* {token} at token 1")
    (scores,) = fg.score(model, [g], placeholders="neutralize")
    neutral = fg.Group(good.prompt_ids, [ids(5, 0, 6, 7), good.completions[1]], good.vision)
    (want,) = tm.naive_logp(model, [neutral])
    assert scores.logp[0][1] == 0
    for i in (0, 2, 3):
        torch.testing.assert_close(scores.logp[0][i], want[0][i], atol=2e-5, rtol=0)
    torch.testing.assert_close(scores.logp[1], want[1], atol=2e-5, rtol=0)
    with pytest.raises(fg.InputError, match="completions"):
        fg.GRPOStep(model, fg.Objective())([g])
    metrics = fg.GRPOStep(model, fg.Objective(), placeholders="neutralize")([g])
    assert metrics["loss"] == pytest.approx(-(3 * 1.0 - 2 * 1.0) / 5)  # 5 tokens count, ratio 1
    with pytest.raises(fg.InputError, match="'refuse' or 'neutralize'"):
        fg.score(model, [g], placeholders="ignore")


def test_ids_outside_the_vocabulary():
    model, g, good = vlm_case(completions=[ids(1, tm.VOCAB)])
    refused(model, g, rf"completions\[0\] has an id outside \[0, {tm.VOCAB}\)")
    model, g, _ = vlm_case(prompt_ids=torch.cat([ids(-1), good.prompt_ids]))
    refused(model, g, "prompt_ids has an id outside")


def test_images_of_another_dtype_are_cast_as_the_model_does():
    model, g, good = vlm_case()
    pixels = good.vision["pixel_values"].double()
    (a,) = fg.score(model, [g])
    (b,) = fg.score(
        model, [fg.Group(g.prompt_ids, g.completions, dict(g.vision, pixel_values=pixels))]
    )
    assert torch.equal(a.logp[0], b.logp[0])


# ---------------------------------------------------------------- images


def test_items_are_equal_in_every_element_or_not_at_all():
    plain = torch.zeros(64 * 50, 4)
    late = plain.clone()
    late[-1, -1] = 1.0  # between the elements that choose candidates
    nan = torch.full_like(plain, float("nan"))
    kinds = [plain, late, nan, plain.double(), plain.view(4, -1), plain[:0], plain.bfloat16()]
    # as strided views and as copies; never next to their equals
    items = [{"pixels": x} for x in (*kinds, *(x.clone() for x in kinds), late.T.clone().T)]
    first = [0, 1, 2, 3, 4, 5, 6, 0, 1, 9, 3, 4, 5, 6, 1]
    assert first_equal(items) == first
    named = [{"pixels": plain}, {"pixels": plain, "grid": ids(1)}, {"other": plain}]
    assert first_equal(named) == [0, 1, 2]


def test_parts_of_a_tensor_nobody_writes_to_are_compared_once(monkeypatch):
    pixels = torch.zeros(8, 5)
    pixels[4:] = 1.0
    compared, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(1) or equal(a, b))

    def firsts():
        return first_equal([{"pixels": part} for part in pixels.split(2)])

    for _ in range(2):  # others may write
        assert firsts() == [0, 0, 2, 2]
        pixels[4:] += 1.0
    assert len(compared) == 6
    nobody_writes_to(pixels)
    assert firsts() == firsts() == [0, 0, 2, 2]
    assert len(compared) == 9
    assert first_equal([{"pixels": pixels[:3]}, {"pixels": pixels[1:4]}]) == [0, 0]


def test_one_piece_and_neighbours_are_joined_without_a_copy():
    pixels = torch.rand(6, 5)
    one, two, three = pixels.split(2)
    assert join([one]) is one
    both = join([two, three])
    assert both.data_ptr() == two.data_ptr() and torch.equal(both, pixels[2:])
