# SPDX-License-Identifier: Apache-2.0
"""Rewards that fail, are absent or infinite, and what a reward is told."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import MIXED  # noqa: E402

from fastgrpo import InputError  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, distinct_characters, image_row, steps_of  # noqa: E402


def test_failing_rewards_do_not_end_the_run(checkpoint, tmp_path, caplog):
    calls = []

    def detection_score(completions, **columns):
        calls.append(len(completions))
        if len(calls) == 2:
            raise UnboundLocalError("label")
        return distinct_characters(completions)

    async def judge(completions, **columns):
        if len(calls) == 2:
            return [float("nan")] + [1.0] * (len(completions) - 1)
        return [None] * len(completions)

    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=3, reward=[detection_score, judge]
    )
    trainer.train()
    steps = steps_of(trainer)
    assert [e["fastgrpo/reward_errors/detection_score"] for e in steps] == [0, 8, 0]
    assert [e["fastgrpo/reward_errors/judge"] for e in steps] == [0, 1, 0]
    assert "reward detection_score: UnboundLocalError: label" in caplog.text
    assert steps[1]["rewards/detection_score/mean"] is None
    assert steps[1]["rewards/judge/mean"] == 1.0
    assert all(0 <= e["grad_norm"] < float("inf") for e in steps)


def test_a_misspelt_column_stops_the_run_at_its_first_batch(checkpoint, tmp_path):
    def exact_match(completions, soluton, **columns):
        return [0.0] * len(completions)

    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, reward=[distinct_characters, exact_match]
    )
    with pytest.raises(InputError, match="exact_match failed for all 8 samples.*soluton"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_infinite_value_of_a_reward_model_is_named_and_counted(checkpoint, tmp_path, caplog):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=1)

    class Model(torch.nn.Module):
        def forward(self, input_ids, **columns):
            scores = torch.arange(len(input_ids), dtype=torch.float32)[:, None]
            return SimpleNamespace(logits=scores.masked_fill(scores == 3, torch.inf))

    trainer.reward_funcs, trainer.reward_func_names = [Model()], ["model"]
    trainer.reward_processing_classes = [trainer._tokenizer]
    trainer.train()
    assert "reward model: returned an infinite value; the reward of 1 sample(s)" in caplog.text
    assert steps_of(trainer)[0]["fastgrpo/reward_errors/model"] == 1
    assert list(trainer._logs["advantages"])[3] == 0.0


def test_a_group_without_any_reward_has_advantage_zero(checkpoint, tmp_path):
    def first_group_fails(completions, **columns):
        return [float("nan")] * 4 + distinct_characters(completions)[4:]

    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, reward=first_group_fails
    )
    trainer.train()
    advantages = list(trainer._logs["advantages"])
    assert advantages[:4] == [0.0] * 4 and any(advantages[4:])
    assert steps_of(trainer)[0]["fastgrpo/reward_errors/first_group_fails"] == 4


def test_a_quarantined_row_has_no_reward(checkpoint, tmp_path, caplog):
    rows = [image_row(i) | {"quarantine_reason": "broken" if i == 0 else None} for i in range(2)]
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, rows=rows)
    seen = []
    original = trainer._calculate_rewards

    def spy(inputs, *args):
        seen.append((inputs, original(inputs, *args)))
        return seen[-1][1]

    trainer._calculate_rewards = spy
    trainer.train()
    for inputs, rewards in seen:
        for row, reward in zip(inputs, rewards, strict=True):
            assert reward.isnan().all() == (row["quarantine_reason"] is not None)
    assert [e["fastgrpo/quarantined"] for e in steps_of(trainer)] == [4, 4]
    assert caplog.text.count("rows set aside while training (broken)") == 1


def test_rewards_see_the_resolution_the_model_saw(checkpoint, tmp_path):
    seen = []

    def reward(completions, image_grid_thw, images, **columns):
        seen.extend(zip(image_grid_thw, images, strict=True))
        return [0.0] * len(completions)

    build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, reward=reward, rows=MIXED
    ).train()
    assert {len(images) for _, images in seen} == {0, 1, 2}
    for grid, images in seen:
        if len(images) == 1:
            width, height = images[0].size
            assert grid == [[1, height // 4, width // 4]]  # patches of 4 pixels
        else:
            assert grid is None
