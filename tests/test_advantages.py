# SPDX-License-Identifier: Apache-2.0
"""Reward shaping, group rules, step rewards and schedules against their formulas."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo import advantages as fa
from fastgrpo.errors import InputError
from fastgrpo.images import perturb
from fastgrpo.judges import trajectory_preference_loss
from fastgrpo.rewards.core import shaping, votes
from fastgrpo.rewards.core.schedule import Schedule


def test_schedule_steps_boundaries_are_inclusive():
    threshold = Schedule.steps([(0.10, 0.85), (0.25, 0.95), (1.0, 0.99)])
    assert [threshold(s, 100) for s in (0, 10, 11, 25, 26, 100, 250)] == [
        0.85, 0.85, 0.95, 0.95, 0.99, 0.99, 0.99,
    ]  # fmt: skip


def test_schedule_kinds():
    assert Schedule.parse(0.3)(7, 10) == 0.3
    linear = Schedule.parse({"kind": "linear", "start": 1.0, "end": 0.0, "until": 0.5})
    assert [linear(s, 10) for s in (0, 5, 9)] == [1.0, 0.0, 0.0]
    assert linear(1, 10) == pytest.approx(0.8)
    cosine = Schedule("cosine", start=2.0, end=1.0)
    assert cosine(5, 10) == pytest.approx(1.5)
    assert Schedule("exponential", start=0.3, rate=2.0)(5, 10) == pytest.approx(0.3 / math.e)


@pytest.mark.parametrize(
    "spec",
    [{"kind": "sine"}, {"until": 0}, {"slope": 1}, "half", True, {"values": [[1, 0], [0, 1]]}],
)
def test_schedule_refuses(spec):
    with pytest.raises(InputError):
        Schedule.parse(spec)


def test_cross_vote_ties_go_to_the_first_seen_and_empty_answers_do_not_count():
    rewards = votes.cross_vote_rewards(["b", "", None, "a"], ["a", "b", "", ""])
    assert rewards == ([0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    assert votes.cross_vote_rewards(["", None], ["1", "1"]) == ([0.0, 0.0], [0.0, 0.0])
    assert votes.majority_vote_rewards(["1", "2", "2", ""]) == [0.0, 1.0, 1.0, 0.0]


def test_trust_lowers_the_weight_of_a_judge_that_prefers_wrong_answers():
    outcome, thinking = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.2, 0.4, 0.9])
    trusted = votes.trust_weighted_rewards(outcome, thinking, step=0)
    gamma = math.exp(0.3 - 0.9)
    assert trusted.gamma == pytest.approx(gamma)
    expected = outcome.double() + 0.3 * gamma * thinking.double()
    torch.testing.assert_close(trusted.rewards, expected, rtol=0, atol=1e-7)
    good = votes.trust_weighted_rewards(outcome, thinking.flip(0), step=100, total=100)
    assert good.gamma == 1.0
    assert good.rewards[2].item() == pytest.approx(0.3 / math.e * 0.2)


def test_trust_without_a_wrong_answer_is_full():
    trusted = votes.trust_weighted_rewards(torch.ones(2), torch.tensor([0.1, 0.5]), step=0)
    assert trusted.gamma == 1.0
    upstream = votes.trust_weighted_rewards(
        torch.ones(2), torch.tensor([0.1, 0.5]), step=0, compat="upstream"
    )
    assert upstream.thinking.tolist() == [0.0, 0.0] and upstream.gamma == 0.5


def test_paired_gate_joins_the_two_rollouts_of_a_question():
    nan = torch.nan
    got = fa.paired_gate(
        torch.ones(6),
        torch.tensor([0.2, 0.4, 0.0, 1.0, 0.0, nan]),
        ["a", "a", "b", "a", "b", "c"],
        [True, True, True, False, False, False],
    )
    torch.testing.assert_close(got, torch.tensor([0.1, 0.1, 0.1, 0.3, 0.0, 1.0]))


def test_online_filter():
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, torch.nan, torch.nan, torch.nan, 1.0])
    kept = fa.keep_groups(rewards, [2, 2, 2, 2, 2], low=0.01, high=0.99)
    assert kept.tolist() == [False, True, False, False, False]
    assert fa.keep_groups(rewards, [2] * 5, low=0, high=1, inclusive=True).tolist() == [
        True, True, True, False, True,
    ]  # fmt: skip


def test_running_shaper_counts_all_batches_like_one():
    torch.manual_seed(0)
    rewards = torch.randn(60)
    for kind in shaping.RunningShaper.KINDS:
        whole, parts = shaping.RunningShaper(kind), shaping.RunningShaper(kind)
        whole(rewards)
        for part in rewards.split(7):
            parts(part)
        torch.testing.assert_close(whole(rewards[:3]), parts(rewards[:3]))
        again = shaping.RunningShaper(kind)
        again.load_state_dict(parts.state_dict())
        assert torch.equal(again(rewards[3:5]), parts(rewards[3:5]))


def test_running_shaper_special_values():
    shaper = shaping.RunningShaper("minmax")
    assert shaper(torch.tensor([torch.nan])).isnan().all()
    assert shaper(torch.tensor([2.0, 2.0, torch.nan])).tolist()[:2] == [0.0, 0.0]


def test_shaping_against_references_closed_form():
    r, ref = torch.tensor([0.0, 7.0, -7.0]), torch.zeros(3, 1)
    torch.testing.assert_close(shaping.par(r, ref, sigmoid_k=2.0), torch.sigmoid(2 * r))
    assert shaping.fitted_polynomial(r, ref).tolist()[1:] == [1.0, 0.0]
    near = torch.linspace(-5, 5, 101)
    fit = shaping.fitted_polynomial(near, torch.zeros(101, 1))
    assert (fit - torch.sigmoid(near)).abs().max() < 0.04
    torch.testing.assert_close(shaping.par(r, torch.zeros(3, 50)), torch.sigmoid(r))
    with pytest.raises(InputError, match="at least 2"):
        shaping.log_sigmoid_centered(r, ref)
    with pytest.raises(InputError, match="references"):
        shaping.par(r, torch.zeros(2, 1))


def test_delta_telescopes_and_clip_never_pays():
    r = torch.tensor([0.5, 0.7, 0.9, 0.3])
    torch.testing.assert_close(
        shaping.delta_step_rewards(r), torch.tensor([-0.2, -0.2, 0.9, 0.0]), atol=1e-6, rtol=0
    )
    assert shaping.delta_step_rewards(r).sum().item() == pytest.approx(0.5)
    assert shaping.delta_step_rewards(torch.tensor([0.4])).tolist() == [0.0]
    assert shaping.delta_step_rewards(torch.zeros(0)).shape == (0,)
    assert (shaping.clip_step_rewards(r, 0.6) <= 0).all()


def test_step_baseline_counts_every_turn():
    episode, step = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.3, 0.1, 0.2])
    rows = dict(groups=[0, 0, 0], trajectories=["a", "a", "b"])
    fixed = fa.step_episode_advantages(episode, step, mode="mean", **rows)
    torch.testing.assert_close(fixed, torch.tensor([0.6, 0.4, -0.5]))
    upstream = fa.step_episode_advantages(episode, step, mode="mean", compat="upstream", **rows)
    torch.testing.assert_close(upstream, torch.tensor([0.55, 0.35, -0.55]))
    alone = fa.step_episode_advantages(episode[:1], step[:1], groups=[0], trajectories=["a"])
    assert alone.item() == pytest.approx(1.3)


def test_trajectory_preference_loss_gradient():
    q = torch.randn(6, dtype=torch.float64, requires_grad=True)
    args = ([2, 1, 3], ["a", "a", "b"], [True, True, False])
    loss = trajectory_preference_loss(q, *args)
    gap = (q[:2].sum() + q[2]) / 2 - q[3:].sum()
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(gap))
    assert torch.autograd.gradcheck(lambda x: trajectory_preference_loss(x, *args), q)
    assert trajectory_preference_loss(q, [6], ["a"], [True]).item() == 0.0


def test_top_share_mask_ragged_with_ties_and_masks():
    scores = torch.tensor([1.0, 1.0, 1.0, 5.0, 2.0, 9.0, 3.0])
    seq_ids = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    chosen = fa.top_share_mask(scores, seq_ids, 0.4)
    assert chosen.tolist() == [True, True, False, True, False, True, False]
    masked = fa.top_share_mask(scores, seq_ids, 0.4, torch.tensor([1, 1, 1, 1, 1, 0, 0]))
    assert masked.tolist() == [True, True, False, True, False, False, False]
    assert fa.top_share_mask(torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.4).shape == (0,)
    assert fa.quantile_mask(scores, seq_ids, 0.4).tolist() == [
        True, True, True, True, False, True, False,
    ]  # fmt: skip


def test_trajectory_weights_do_not_depend_on_the_micro_batch():
    dependency = torch.tensor([0.1, 0.5, 0.2, 0.9])
    weights = fa.trajectory_weights(dependency)
    assert weights.mean().item() == pytest.approx(1.0) and weights.min().item() == pytest.approx(
        0.9
    )
    published = fa.trajectory_weights(dependency, mean_over=[2, 2])
    assert not torch.allclose(weights, published)
    assert fa.trajectory_weights(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    partly = fa.trajectory_weights(dependency, valid=torch.tensor([1, 1, 0, 1]))
    assert partly[2] == 1.0 and partly[[0, 1, 3]].mean().item() == pytest.approx(1.0)


def test_visual_dependency_is_bounded():
    d = fa.visual_dependency(torch.zeros(3), torch.tensor([1e4, -1e4, 0.0]))
    assert d.tolist() == [10.0, 10.0, 0.0]
    tiny = fa.visual_dependency(torch.zeros(1).double(), torch.full((1,), 1e-4).double())
    assert tiny.item() == pytest.approx(5e-9, rel=1e-3)


def test_sequence_mean_skips_masked_nan():
    scores = torch.tensor([1.0, torch.nan, 3.0])
    ids = torch.tensor([0, 0, 2])
    assert fa.sequence_mean(scores, ids, 3, torch.tensor([1, 0, 1])).tolist() == [1.0, 0.0, 3.0]


def test_column_aggregation():
    rewards = torch.tensor([[1.0, 10.0], [0.0, 20.0], [torch.nan, 10.0], [torch.nan, torch.nan]])
    summed = fa.column_advantages(rewards, 2, weights=[2.0, 0.1])
    # Sums of 3 and 2; a standard deviation of 2 ** -0.5; one scored row alone.
    expected = torch.tensor([0.5, -0.5]).div(0.5**0.5 + 1e-4)
    torch.testing.assert_close(summed[:2], expected)
    assert summed[2:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(fa.column_advantages(rewards, 2)[:2], -expected, rtol=2e-4, atol=0)
    opposed = torch.tensor([[1.0, 5.0], [0.0, 6.0]])
    gdpo = fa.column_advantages(opposed, 2, aggregation="normalize_then_sum")
    assert gdpo.tolist() == [0.0, 0.0]  # the two columns disagree and weigh the same
    torch.testing.assert_close(
        fa.column_advantages(opposed, 2, weights=[2.0, 1.0], aggregation="normalize_then_sum"),
        torch.tensor([0.5, -0.5]).mul(2**0.5).div(1 + 1e-4 / 0.5**0.5), rtol=1e-3, atol=0,
    )  # fmt: skip
    with pytest.raises(InputError, match="weights"):
        fa.column_advantages(rewards, 2, weights=[1.0])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kind", sorted(perturb.PERTURBATIONS))
def test_perturbations_keep_size_and_mode_and_repeat_by_seed(kind, mode):
    image = Image.fromarray(
        np.random.RandomState(0).randint(0, 256, (31, 45, 4), dtype=np.uint8), "RGBA"
    ).convert(mode)
    once, twice = (perturb.perturb(image, kind, seed=3) for _ in range(2))
    assert once.size == image.size and once.mode == image.mode
    assert once.tobytes() == twice.tobytes() != image.tobytes()


def test_perturb_refuses_unknown_kind():
    with pytest.raises(InputError, match="blacken"):
        perturb.perturb(Image.new("RGB", (4, 4)), "rotate")
