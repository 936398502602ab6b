# SPDX-License-Identifier: Apache-2.0
"""group_advantages against loops over groups, TRL's arithmetic, and its promises."""

import math
import statistics

import pytest
import torch

import fastgrpo as fg

SIZES = (4, 1, 2, 0, 7, 3)


def loops(rewards, sizes, scale, baseline, eps=1e-4):
    """The formulas group by group in Python floats."""
    scored = [r for r in rewards if not math.isnan(r)]
    batch = statistics.stdev(scored) if len(scored) > 1 else 0.0
    out, start = [], 0
    for size in sizes:
        group = rewards[start : start + size]
        known = [r for r in group if not math.isnan(r)]
        for i, r in enumerate(group):
            if math.isnan(r):
                out.append(0.0)
                continue
            rest = [x for j, x in enumerate(group) if j != i and not math.isnan(x)]
            among = rest if baseline == "leave_one_out" else known
            centred = r - statistics.fmean(among) if among else 0.0
            std = statistics.stdev(known) if len(known) > 1 else 0.0
            divisor = {"group": std + eps, "batch": batch + eps, "none": 1.0}[scale]
            out.append(centred / divisor)
        start += size
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("missing", [False, True])
def test_against_loops(scale, baseline, missing):
    rewards = torch.randn(sum(SIZES), dtype=torch.float64)
    if missing:
        rewards[[1, 5, 6, 8]] = math.nan
    got = fg.group_advantages(rewards, SIZES, scale_rewards=scale, baseline=baseline)
    want = loops(rewards.tolist(), SIZES, scale, baseline)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    single = fg.group_advantages(rewards.float(), SIZES, scale_rewards=scale, baseline=baseline)
    assert single.dtype == torch.float32
    want = loops(rewards.float().tolist(), SIZES, scale, baseline)
    assert (single - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equals_trl_arithmetic(scale):
    utils = pytest.importorskip("trl.trainer.utils")
    rewards = torch.randn(24)
    rewards[3] = math.nan
    grouped = rewards.view(-1, 8)
    want = rewards - torch.nanmean(grouped, 1).repeat_interleave(8)
    if scale == "group":
        want = want / (utils.nanstd(grouped, dim=1).repeat_interleave(8) + 1e-4)
    elif scale == "batch":
        want = want / (utils.nanstd(rewards) + 1e-4)
    want = torch.where(rewards.isnan(), 0.0, want)
    got = fg.group_advantages(rewards, 8, scale_rewards=scale)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.2, 0.3, 0.7, 0.9, 100.1, 1 / 3, -2.5, 1e38])
@pytest.mark.parametrize("G", [1, 3, 4, 7, 8, 16])
def test_equal_rewards_are_exactly_zero(value, G):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rewards = torch.full((2 * G,), value, dtype=dtype)
        for scale in ("group", "batch", "none"):
            for baseline in ("mean", "leave_one_out"):
                out = fg.group_advantages(rewards, G, scale_rewards=scale, baseline=baseline)
                assert (out == 0).all()


def test_a_group_without_spread_is_zero_beside_one_with():
    out = fg.group_advantages([0.1, 0.1, 0.1, 0.0, 1.0, 0.5], 3, scale_rewards="batch")
    assert (out[:3] == 0).all() and (out[3:5] != 0).all()


def test_unscored():
    out = fg.group_advantages([None, 1.0, None, None, 2.0, 4.0], 3)
    assert out[:4].tolist() == [0, 0, 0, 0] and out[4] < 0 < out[5]
    assert (fg.group_advantages([None] * 4, 2) == 0).all()
    assert (fg.group_advantages([None] * 4, 2, scale_rewards="batch") == 0).all()


def test_large_and_tiny_rewards():
    out = fg.group_advantages(torch.tensor([1e38, -1e38, 0.0, 0.0]), 4)
    torch.testing.assert_close(out, torch.tensor([1.2247, -1.2247, 0.0, 0.0]), atol=1e-4, rtol=0)
    out = fg.group_advantages(torch.tensor([1.0, 1.0 + 1e-6]), 2)
    assert out.abs().max() < 0.01  # eps keeps rounding noise small


def test_empty_strided_and_detached():
    assert fg.group_advantages(torch.empty(0), []).shape == (0,)
    assert fg.group_advantages(torch.empty(0), [0, 0]).shape == (0,)
    rewards = torch.randn(8, 3, requires_grad=True)[:, 1]
    out = fg.group_advantages(rewards, torch.tensor([5, 3]))
    assert not out.requires_grad
    assert torch.equal(out, fg.group_advantages(rewards.detach().contiguous(), (5, 3)))


def test_sums_to_zero_per_group():
    rewards = torch.randn(sum(SIZES))
    for part in fg.group_advantages(rewards, SIZES).split(SIZES):
        assert part.sum().abs() <= 1e-5 * max(1, len(part))


def test_refusals():
    cases = [
        ("rewards: row 1 is inf", ([0.0, math.inf], 2), {}),
        ("rewards: row 0 is -inf", ([-math.inf, 0.0], 2), {}),
        ("group_sizes: expected a divisor", ([0.0] * 5, 2), {}),
        ("group_sizes: expected a divisor", ([0.0] * 5, 0), {}),
        ("group_sizes: expected sizes >= 0", ([0.0] * 5, [2, 2]), {}),
        ("group_sizes: expected sizes >= 0", ([0.0] * 5, [6, -1]), {}),
        ("group_sizes: expected an int or", ([0.0] * 5, [2.5, 2.5]), {}),
        ("scale_rewards", ([0.0], 1), {"scale_rewards": "std"}),
        ("baseline", ([0.0], 1), {"baseline": "median"}),
        ("rewards: expected shape", (torch.zeros(2, 2), 2), {}),
        ("rewards: expected a floating", (torch.zeros(2).long(), 2), {}),
    ]
    for message, args, kwargs in cases:
        with pytest.raises(fg.InputError, match=message):
            fg.group_advantages(*args, **kwargs)
