# SPDX-License-Identifier: Apache-2.0
"""The recorder of a trainer: the time of a step is split without counting any of it twice."""

from collections import defaultdict

import pytest

pytest.importorskip("trl")

from fastgrpo.integrations.trl import recorder  # noqa: E402


class FakeTrainer:
    """The methods `record` wraps, each "taking" some seconds of a fake clock."""

    def __init__(self, clock):
        self.clock, self.callbacks, self.extra = clock, [], {}
        self._metrics = {"train": defaultdict(list)}

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def _log_completion_extra(self, column, values):
        self.extra[column] = values

    def training_step(self):
        self._prepare_inputs()
        self.compute_loss()
        self.clock(16)

    def _prepare_inputs(self):
        self._generate_single_turn()
        self._get_per_token_logps_and_entropies()
        rows = [{"image_path": ["a.png"], "solution": (1, 2), "id": 4}]
        self._calculate_rewards(rows, ["where?"], ["there"])
        self.clock(1)

    def _generate_single_turn(self):
        self.clock(2)

    def _calculate_rewards(self, inputs, prompts, completions):
        self.clock(4)

    def _get_per_token_logps_and_entropies(self):
        self.clock(8)

    def compute_loss(self):
        self._get_per_token_logps_and_entropies()
        self.clock(32)


def test_record_splits_a_step_without_counting_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(recorder.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    trainer = FakeTrainer(spend)
    recorder.record(trainer)
    times, _ = trainer.callbacks
    for _ in range(2):
        trainer.training_step()
    times.on_pre_optimizer_step(None, None, None)
    spend(0.5)
    times.on_optimizer_step(None, None, None)
    times.on_step_end(None, None, None)
    seconds = {key: value for key, (value,) in trainer._metrics["train"].items()}
    assert seconds == {
        "time/generate": 4,
        "time/old and reference log-probs": 16,
        "time/rewards": 8,
        "time/prepare": 2,
        "time/policy forward": 80,
        "time/backward": 32,
        "time/optimizer": 0.5,
    }
    assert sum(seconds.values()) == now[0]
    assert trainer.extra == {"image_path": [["a.png"]], "solution": [[1, 2]]}
