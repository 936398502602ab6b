# SPDX-License-Identifier: Apache-2.0
"""TRL's trainer and ours on a GPU."""

import logging

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("as_users_run")]


@pytest.fixture(scope="module")
def runs():
    """The helpers of the trainer's tests, which need more packages than the other tests here."""
    for package in ("trl", "datasets", "PIL"):
        pytest.importorskip(package)
    import trl_runs

    return trl_runs


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
        {"loss_type": "bnpo", "beta": 0.0, "gradient_accumulation_steps": 2},
        {"loss_type": "dapo", "gradient_checkpointing": True, "max_completion_length": 20},
    ],
    ids=str,
)
def test_parity_in_float32(runs, checkpoint, tmp_path, options):
    """The same tokens, losses, gradient norms and metrics as TRL's."""
    fast = runs.SAME_ROWS | {"self_check": False}
    options |= {"max_steps": 3, "rows": runs.IMAGES, "use_cpu": False}
    runs.compare(checkpoint, tmp_path, fast=fast, **options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "llava"])
def test_as_shipped_in_bfloat16(runs, family, tmp_path, caplog):
    """Checkpointing, a reference model, the self-check: four steps with finite gradients."""
    from fastgrpo.testing.trl import build_trainer, save_checkpoint, steps_of

    with caplog.at_level(logging.WARNING):
        trainer = build_trainer(
            runs.FastGRPOTrainer,
            save_checkpoint(tmp_path / "model", family),
            tmp_path / "out",
            rows=runs.IMAGES,
            use_cpu=False,
            bf16=True,
            gradient_checkpointing=True,
            max_completion_length=24,
            max_steps=4,
        )
        trainer.train()
    found = steps_of(trainer)
    assert len(found) == 4 and max(step["grad_norm"] for step in found) > 0
    assert all(torch.tensor(step["loss"]).isfinite() for step in found)
    recurrent = family == "qwen3_5"  # without fla its step copies from the host
    assert recurrent or "CUDA graph" not in caplog.text
