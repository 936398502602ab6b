# SPDX-License-Identifier: Apache-2.0
"""Unpadding TRL's rows, scattering back, and keeping groups together."""

import random

import pytest
import torch

pytest.importorskip("trl")

from fastgrpo import InputError  # noqa: E402
from fastgrpo.integrations.trl.rows import (  # noqa: E402
    LossTables,
    anchor_row,
    as_groups,
    plan_micro_batches,
    read_rows,
    scatter,
    scorable,
    without_gradient,
)
from fastgrpo.models import families  # noqa: E402

PAD = 9
HALVES = slice(16), slice(16, 32)  # the optimizer steps of 32 rows


def plan(group_of_row, order, batches, *, live=None, batches_per_step=None, costs=None):
    return plan_micro_batches(
        group_of_row,
        order,
        batches,
        live=live or [True] * len(order),
        batches_per_step=batches_per_step or batches,
        costs=costs,
    )


def batch(prompts, completions):
    """Left-padded prompts, right-padded completions, and their mask."""
    width, columns = (max(map(len, rows)) for rows in (prompts, completions))
    ids, mask = [], []
    for p, c in zip(prompts, completions, strict=True):
        ids.append([PAD] * (width - len(p)) + p + c + [PAD] * (columns - len(c)))
        mask.append([0] * (width - len(p)) + [1] * (len(p) + len(c)) + [0] * (columns - len(c)))
    return torch.tensor(ids), torch.tensor(mask), columns


def read(ids, mask, columns, fields=None, family="qwen2_5_vl", **kwargs):
    return read_rows(ids, mask, columns, families()[family], fields or {}, **kwargs)


def test_rows_are_cut_by_the_mask_not_by_the_pad_id():
    prompts = [[1, PAD, 2], [PAD, PAD, 3, 4], [5]]
    completions = [[PAD, 6], [7, PAD, PAD], []]
    rows = read(*batch(prompts, completions))
    assert [p.tolist() for p in rows.prompts] == prompts
    assert [c.tolist() for c in rows.completions] == completions
    members = scorable(rows)
    assert members == [0, 1]  # an empty completion is not scored
    groups = as_groups(rows, members)
    assert [g.prompt_ids.tolist() for g in groups] == prompts[:2]


def test_a_truncated_completion_masked_by_trl_is_an_empty_one():
    ids, mask, columns = batch([[1, 2], [1, 2]], [[3, 4, 5], [3, 4, 5]])
    mask[1, 2:] = 0
    assert scorable(read(ids, mask, columns)) == [0]


def test_a_hole_in_a_completion_is_refused():
    ids, mask, columns = batch([[1, 2], [1, 2]], [[3, 4, 5], [3, 4, 5]])
    mask[1, 3] = 0
    with pytest.raises(InputError, match="row 1: .*hole"):
        read(ids, mask, columns)


def test_vision_is_cut_by_images_per_row():
    grids = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 6]])
    pixels = torch.arange(24.0)[:, None]
    fields = dict(pixel_values=pixels, image_grid_thw=grids)
    rows = read(*batch([[1]] * 4, [[2]] * 4), fields, num_images=[1, 0, 2, 0])
    assert [v["pixel_values"].flatten().tolist() if v else None for v in rows.vision] == [
        [0.0, 1.0, 2.0, 3.0],
        None,
        list(map(float, range(4, 24))),
        None,
    ]
    assert rows.vision[2]["image_grid_thw"].tolist() == [[1, 4, 2], [1, 2, 6]]


def test_a_batch_of_text_rows_with_empty_pixels_has_no_vision():
    empty = dict(
        pixel_values=torch.zeros(0, 3),
        image_grid_thw=torch.zeros(0, 3, dtype=torch.long),
    )
    assert read(*batch([[1]] * 2, [[2]] * 2), empty, num_images=[0, 0]).vision == [{}, {}]


def test_another_layout_of_pixels_is_refused():
    with pytest.raises(InputError, match="pixel_values"):
        read(*batch([[1]], [[2]]), dict(pixel_values=torch.zeros(2, 3, 4, 4)), num_images=[2])


def test_images_of_a_tool_are_their_completions_where_they_are_served():
    """Three images: one of the first row's prompt, two that its completion was shown."""
    pixels = torch.arange(12.0)[:, None]
    fields = dict(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 2, 2]] * 3))
    ids, mask, columns = batch([[1, 7], [1, 2]], [[3, 7, 4, 7], [5]])
    types = {"mm_token_type_ids": (ids == 7).int()}
    rows = read(ids, mask, columns, fields, num_images=[3, 0], **types)
    assert rows.vision[0]["pixel_values"].flatten().tolist() == [0, 1, 2, 3]
    assert rows.shown[0]["pixel_values"].flatten().tolist() == list(range(4, 12))
    assert rows.vision[1] == rows.shown[1] == {}
    first, second = as_groups(rows, [0, 1])
    assert first.completion_vision == [rows.shown[0]] and second.completion_vision is None
    with pytest.raises(InputError, match="row 0: images inside .* not served for family 'gemma3'"):
        read(ids, mask, columns, family="gemma3", token_type_ids=(ids == 7).int())


def test_scatter_puts_values_in_their_rows_zeros_elsewhere_and_passes_gradients():
    rows = read(*batch([[1]] * 4, [[2, 3], [], [4, 5, 6], [7]]))
    members = scorable(rows)
    values = [torch.tensor(v, requires_grad=True) for v in ([1.0, 2.0], [3.0, 4.0, 5.0], [6.0])]
    padded = scatter(values, members, rows)
    assert padded.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5], [6, 0, 0]]
    weights = torch.arange(12.0).view(4, 3)
    (padded * weights).sum().backward()
    assert [v.grad.tolist() for v in values] == [[0, 1], [6, 7, 8], [9]]


def test_scatter_of_nothing_is_zero():
    rows = read(*batch([[1], [2]], [[], []]))
    assert scatter([], [], rows).shape == (2, 0)


@pytest.mark.parametrize(
    "groups, per_group, batches, whole",
    [(4, 4, 2, True), (4, 4, 4, True), (4, 4, 8, False), (3, 4, 2, False), (6, 2, 3, True)],
)
def test_micro_batches_hold_each_row_once_and_whole_groups_where_they_fit(
    groups, per_group, batches, whole
):
    group_of_row = [row // per_group for row in range(groups * per_group)]
    order = list(range(len(group_of_row)))
    random.Random(0).shuffle(order)
    planned = plan(group_of_row, order, batches)
    assert sorted(planned) == list(range(len(group_of_row)))
    size = len(planned) // batches
    chunks = [planned[i : i + size] for i in range(0, len(planned), size)]
    split = sum(
        len({c for c, rows in enumerate(chunks) for r in rows if group_of_row[r] == g}) > 1
        for g in range(groups)
    )
    assert split == 0 if whole else split <= groups - (size // per_group) * batches
    other = plan(group_of_row, sorted(order), batches)
    assert whole is False or planned != other  # the order given decides which groups meet


def test_groups_that_straddle_processes_are_planned_too():
    group_of_row = [0, 0, 0, 1, 1, 1, 1, 2]  # this process has the end of 0 and the start of 2
    planned = plan(group_of_row, [4, 0, 7, 1, 2, 3, 5, 6], 2)
    assert sorted(planned) == list(range(8))
    assert {frozenset(planned[:4]), frozenset(planned[4:])} == {
        frozenset({3, 4, 5, 6}),
        frozenset({0, 1, 2, 7}),
    }


@pytest.mark.parametrize(
    ("groups", "per_group", "batches", "per_step", "alive"),
    [
        (4, 4, 4, 1, [0, 1]),  # fewer live groups than steps
        (4, 4, 4, 2, [2, 3]),  # one live group for each step
        (8, 4, 4, 2, [1, 2, 3]),
        (2, 8, 4, 1, [1]),  # a group larger than a micro-batch
        (4, 4, 8, 1, [3]),  # as many steps as live rows and more
        (6, 3, 3, 1, [0, 1, 2, 3, 4, 5]),
        (4, 4, 4, 3, [1]),  # steps that do not divide the generation
    ],
)
def test_live_groups_are_spread_over_the_optimizer_steps(
    groups, per_group, batches, per_step, alive
):
    group_of_row = [row // per_group for row in range(groups * per_group)]
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        live = [group in alive for group in group_of_row]
        if trial % 2:  # rows of a live group at its mean have no weight either
            weights = torch.rand(len(live), generator=generator) < 0.5
            live = [
                own and (row % per_group == 0 or bool(weights[row])) for row, own in enumerate(live)
            ]
        order = torch.randperm(len(live), generator=generator).tolist()
        planned = plan(group_of_row, order, batches, live=live, batches_per_step=per_step)
        assert sorted(planned) == sorted(order)
        steps = 1 if batches % per_step else batches // per_step
        size = len(live) // steps
        rows = [sum(live[row] for row in planned[i * size :][:size]) for i in range(steps)]
        assert min(rows) >= min(1, sum(live) // steps)
        assert max(rows) - min(rows) <= per_group, rows
        whole = len(alive) >= steps and per_group <= len(live) // batches
        chunk = len(live) // batches
        chunks = [
            {group_of_row[row] for row in planned[i : i + chunk]}
            for i in range(0, len(live), chunk)
        ]
        if whole:
            assert all(sum(group in c for c in chunks) == 1 for group in alive)


def test_micro_batches_of_like_cost_meet():
    """Two processes that wait for each other after every micro-batch of 4 rows."""
    draw = random.Random(0)
    group_of_row, waits = [row // 4 for row in range(32)], [0.0, 0.0]
    for _ in range(20):
        order = draw.sample(range(32), 32)
        spent: list[list[list[float]]] = [[], []]
        for costs in ([draw.uniform(1, 9) for _ in range(32)] for _ in range(2)):
            plans = [
                plan(group_of_row, order, 8, batches_per_step=4, costs=c) for c in (None, costs)
            ]
            assert all(set(plans[0][half]) == set(plans[1][half]) for half in HALVES)
            for sums, rows in zip(spent, plans, strict=True):
                sums.append([sum(costs[r] for r in rows[i : i + 4]) for i in range(0, 32, 4)])
        for known, (one, other) in enumerate(spent):
            waits[known] += sum(abs(a - b) for a, b in zip(one, other, strict=True))
    assert waits[1] < 0.6 * waits[0], waits


def test_only_prompts_without_any_weight_need_no_gradient():
    rows = read(*batch([[1], [1], [2], [2], [3]], [[4]] * 4 + [[]]))
    weightless = [True, False, True, True, True]
    assert without_gradient(rows, scorable(rows), weightless) == [2, 3]


def test_a_row_runs_with_gradient_when_trl_would_reach_more_parameters():
    images = dict(pixel_values=torch.zeros(4, 3), image_grid_thw=torch.tensor([[1, 2, 2]]))
    rows = read(*batch([[1], [2]], [[3], [4]]), images, num_images=[0, 1])
    for members in ([0, 1], [1]):
        assert anchor_row(rows, members, [], needed=True) == (members, [])
    # no row with gradient has an image, but TRL's forward sees one
    assert anchor_row(rows, [0], [], needed=True) == ([0, 1], [])
    assert anchor_row(rows, [0, 1], [1], needed=True) == ([0, 1], [])
    assert anchor_row(rows, [0, 1], [0, 1], needed=True) == ([1], [0])
    assert anchor_row(rows, [0, 1], [0, 1], needed=False) == ([], [0, 1])
    text = read(*batch([[1], [2]], [[], []]))
    live, idle = anchor_row(text, [], [], needed=True)
    (group,) = as_groups(text, live)
    assert group.prompt_ids.tolist() == group.completions[0].tolist() == [1]
    assert not group.mask[0].any() and idle == []


def test_the_shortest_row_without_weight_is_the_one_to_run():
    rows = read(*batch([[1]] * 3, [[3, 4], [5], [6, 7, 8]]))
    assert anchor_row(rows, [0, 1, 2], [0, 1, 2], needed=True) == ([1], [0, 2])


def test_the_loss_reads_each_row_up_to_its_end():
    rows = read(*batch([[1], [2], [3]], [[4, 5, 6], [7], []]))
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]])
    table = torch.arange(9.0).view(3, 3)
    columns = {"old_logp": table, "perturbed": -table}
    tables = LossTables(torch.tensor([0.5, 0.0, 0.0]), mask, columns)
    assert tables.num_tokens == 3 and tables.weightless() == [False, True, True]
    first, second, empty = tables.groups(rows, [0, 1, 2])
    assert first.advantages.tolist() == [0.5] and first.mask[0].tolist() == [True, False, True]
    assert first.old_logp[0].tolist() == [0.0, 1.0, 2.0]
    assert second.streams["perturbed"][0].tolist() == [-3.0]
    assert empty.completions[0].tolist() == [3] and not empty.mask[0].any()
    per_token = LossTables(table / 9, mask, {})
    assert per_token.groups(rows, [1])[0].advantages[0].tolist() == pytest.approx([3 / 9])
