# SPDX-License-Identifier: Apache-2.0
"""Importance corrections for another engine's samples: the same rollouts give TRL's numbers."""

import math

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import compare  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, steps_of  # noqa: E402

VOCABULARY = 90  # text tokens of the tiny checkpoint, no placeholder among them
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
OPTIONS = {"use_vllm": True, "vllm_mode": "colocate", "max_steps": 2, "num_iterations": 2}


class Engine:
    """In vLLM's place: completions and log-probs of its own, the same in every run.

    A log-prob is near that of a uniform policy, some ratios on either side of every bound, and NaN
    for a token the engine could not score.
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
            logps.append([[value] for value in (noise - math.log(VOCABULARY)).tolist()])
        logps[1][-1] = [math.nan]
        return prompts, completions, logps, None


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)


CASES = {mode: {"vllm_importance_sampling_mode": mode} for mode in MODES} | {
    "both bounds": {
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": 0.8,
        "vllm_importance_sampling_clip_max": 1.5,
    },
    "sequence ratios of the policy": {
        "vllm_importance_sampling_mode": "token_mask",
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
    },
    "vespo": {"vllm_importance_sampling_mode": "token_truncate", "loss_type": "vespo"},
    "no correction": {"vllm_importance_sampling_correction": False},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_trl_on_the_same_rollouts(checkpoint, tmp_path, case):
    stock, *ours = compare(checkpoint, tmp_path, **OPTIONS, **CASES[case])
    assert all(run.vllm_generation.syncs == stock.vllm_generation.syncs > 0 for run in ours)


def test_the_correction_reaches_the_fused_loss(checkpoint, tmp_path):
    norms = {}
    for mode in (*MODES, None):
        own = {"vllm_importance_sampling_correction": mode is not None}
        own |= {"vllm_importance_sampling_mode": mode} if mode else {}
        options = OPTIONS | {"max_steps": 1, "num_iterations": 1} | own
        trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / str(mode), **options)
        trainer.train()
        norms[mode] = steps_of(trainer)[0]["grad_norm"]
    assert len({round(norm, 5) for norm in norms.values()}) == len(norms)
