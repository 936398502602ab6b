# SPDX-License-Identifier: Apache-2.0
"""The Triton group advantages against the float64 reference, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels.group_advantages import group_advantages as kernel

from fastgrpo.ops.group_advantages import group_advantages

pytestmark = pytest.mark.interpreter
SCALES, BASELINES = ("group", "batch", "none"), ("mean", "leave_one_out")


def check(rewards, sizes, **options):
    ours = group_advantages(rewards, sizes, impl="triton", **options)
    want = group_advantages(rewards.double(), sizes, impl="reference", **options)
    torch.testing.assert_close(ours.double(), want, rtol=1e-6, atol=1e-7)
    return ours


# empty groups, groups of one, longer than a tile is wide, more groups than a tile is high
@pytest.mark.parametrize("sizes", [[8, 8], [1, 0, 7, 3], [300, 2, 0], [5] * 70, [64], [65]])
@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_group_advantages_ragged(sizes, scale_rewards, baseline):
    rewards = torch.randn(sum(sizes))
    rewards[::5] = torch.nan
    ours = check(rewards, sizes, scale_rewards=scale_rewards, baseline=baseline)
    assert not ours[::5].any()


@pytest.mark.parametrize("value", [0.1, 0.9, 100.1, 10000.1, -3e37, 0.0])
@pytest.mark.parametrize("scale_rewards", SCALES)
def test_group_advantages_of_equal_rewards_are_exactly_zero(value, scale_rewards):
    rewards = torch.full((24,), value)
    rewards[3] = torch.nan
    assert not check(rewards, 8, scale_rewards=scale_rewards).any()


@pytest.mark.parametrize("baseline", BASELINES)
def test_group_advantages_of_one_scored_reward_are_exactly_zero(baseline):
    rewards = torch.full((8,), torch.nan)
    rewards[5] = 7.0
    assert not check(rewards, [8], baseline=baseline).any()
    assert not check(torch.full((8,), torch.nan), [4, 4], baseline=baseline).any()


def test_group_advantages_dtypes_strides_and_nothing():
    base = torch.randn(32)
    check(base[::2], 4)
    assert check(base.double()[:12], [5, 7]).dtype == torch.float64
    half = base[:12].bfloat16()
    ours = group_advantages(half, 6, impl="triton")
    torch.testing.assert_close(ours, group_advantages(half.float(), 6, impl="reference"))
    assert check(base[:0], []).shape == (0,)


def test_group_advantages_large_offset_keeps_precision():
    check(10000.0 + torch.rand(64), 16)


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_group_advantages_unread_infinities_poison_their_group(scale_rewards):
    rewards = torch.randn(12)
    rewards[5], rewards[6] = torch.inf, torch.nan
    ours = group_advantages(rewards, 4, impl="triton", validate=False, scale_rewards=scale_rewards)
    assert ours[[4, 5, 7]].isnan().all() and ours[6] == 0
    want = group_advantages(rewards[:4], 4, scale_rewards=scale_rewards)
    torch.testing.assert_close(ours[:4], want)


@pytest.mark.parametrize("sizes", [[4, 4], [4, 9], [5, -1, 5]])
def test_group_advantages_unread_sizes_that_do_not_fit_are_nan_everywhere(sizes):
    rewards = torch.randn(9)
    assert kernel(rewards, torch.tensor(sizes)).isnan().all()
    torch.testing.assert_close(
        kernel(rewards, torch.tensor([4, 5])), kernel(rewards, torch.tensor([4, 5]), 5)
    )


def test_group_advantages_repeat_bitwise_and_groups_do_not_mix():
    rewards = torch.randn(40)
    first = group_advantages(rewards, 8, impl="triton")
    other = rewards.clone()
    other[8:16] = 7.0
    assert torch.equal(first, group_advantages(rewards, 8, impl="triton"))
    assert torch.equal(first[:8], group_advantages(other, 8, impl="triton")[:8])


def test_group_advantages_is_a_registered_op():
    op = torch.ops.fastgrpo.group_advantages_triton.default
    for sizes in ((torch.tensor([4, 2]), 0, 4), (torch.tensor([4, 2]), 0, None), (None, 3, 3)):
        torch.library.opcheck(op, (torch.randn(6), *sizes, "batch", "leave_one_out", 1e-4))
