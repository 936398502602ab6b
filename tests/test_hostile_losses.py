# SPDX-License-Identifier: Apache-2.0
"""Hostile rewards and log-ratios, one row of a table each, with what is promised."""

import math

import pytest
import torch

import fastgrpo as fg

INF, NAN = math.inf, math.nan


REWARDS = {
    "None": ([None, 1.0, 2.0], "value"),
    "NaN": ([NAN, 1.0, 2.0], "value"),
    "one scorable": ([NAN, 5.0, NAN], "zero"),
    "none scorable": ([NAN] * 3, "zero"),
    "inf": ([INF, 1.0, 2.0], "rewards: row 0"),
    "-inf beside NaN": ([NAN, -INF, 2.0], "rewards: row 1"),
    "1e38": ([1e38, -1e38, 0.0], "value"),
    "equal 1e38": ([1e38] * 3, "zero"),
    "equal 0.1": ([0.1] * 3, "zero"),
    "equal 100.1": ([100.1] * 3, "zero"),
    "subnormal": ([1e-40, 2e-40, 0.0], "value"),
}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("case", REWARDS)
def test_rewards(case, scale):
    rewards, promise = REWARDS[case]
    if promise not in ("zero", "value"):
        with pytest.raises(fg.InputError, match=promise):
            fg.group_advantages(rewards, 3, scale_rewards=scale)
        return
    out = fg.group_advantages(rewards, 3, scale_rewards=scale)
    assert out.isfinite().all()
    assert all(a == 0 for a, r in zip(out, rewards, strict=True) if r is None or math.isnan(r))
    assert promise == "value" or (out == 0).all()


RATIOS = [20.0, -20.0, 88.0, -88.0, 1e4, -1e4, INF, -INF]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_ratio_and_kl(ratio, sign, masked):
    logp = torch.full((4,), -1.0, requires_grad=True)
    mask = torch.tensor([True, not masked, True, True])
    hostile = torch.tensor([-1.0, -1.0 - ratio, -1.0, -1.0])
    for name in ("grpo", "dapo", "sapo", "gmpo"):
        result = fg.grpo_loss(
            logp, torch.tensor([sign]), fg.Objective(name, beta=0.1),
            seq_ids=torch.zeros(4).long(), mask=mask, old_logp=hostile, ref_logp=hostile,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(result.loss, logp)
        assert result.loss.isfinite() and grad.isfinite().all()
        assert not masked or grad[1] == 0
