# SPDX-License-Identifier: Apache-2.0
"""Importance corrections for another engine's samples: the same rollouts give TRL's numbers."""

import math

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import PATHS, compare  # noqa: E402

from fastgrpo.testing.trl import steps_of  # noqa: E402

VOCABULARY = 90  # text tokens of the tiny checkpoint, no placeholder among them
MEAN = 4.5  # of its -log p
OPTIONS = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_importance_sampling_clip_max": 1.5,
    "max_steps": 2,
    "num_iterations": 2,
}


class Engine:
    """In vLLM's place: completions and log-probs of its own, the same in every run.

    Log-probs are around the policy's, so that ratios lie on either side of the bounds, and NaN for
    a token the engine could not score.
    """

    def __init__(self, **settings):
        self.generator = torch.Generator().manual_seed(5)
        self.syncs = 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler):
        lengths = torch.randint(1, 7, (len(prompts),), generator=self.generator).tolist()
        completions, logps = [], []
        for n in lengths:
            completions.append(
                torch.randint(5, VOCABULARY, (n,), generator=self.generator).tolist()
            )
            noise = torch.randn(n, generator=self.generator) * 0.7
            logps.append([[value] for value in (noise - MEAN).tolist()])
        logps[1][-1] = [math.nan]
        return prompts, completions, logps, None


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)


CASES = {
    "token_truncate": {"vllm_importance_sampling_clip_min": 0.8},
    "token_mask": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "sequence_truncate": {"vllm_importance_sampling_clip_max": 0.5},
    "sequence_mask": {"vllm_importance_sampling_clip_max": 0.5, "paths": PATHS},
    "token_truncate of vespo": {"loss_type": "vespo"},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_trl_on_the_same_rollouts(checkpoint, tmp_path, case):
    mode = case.split()[0]
    options = {"paths": ("fused",), "vllm_importance_sampling_mode": mode} | OPTIONS | CASES[case]
    stock, *ours = compare(checkpoint, tmp_path, **options)
    assert all(run.vllm_generation.syncs == stock.vllm_generation.syncs > 0 for run in ours)
    ratio = "sampling/importance_sampling_ratio"
    first = steps_of(stock)[0]
    assert 0.0 <= first[f"{ratio}/min"] < first[f"{ratio}/max"] <= 1.5  # it weighs the tokens


def test_samples_without_a_correction(checkpoint, tmp_path):
    compare(checkpoint, tmp_path, ("fused",), vllm_importance_sampling_correction=False, **OPTIONS)
