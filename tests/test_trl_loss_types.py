# SPDX-License-Identifier: Apache-2.0
"""Losses that TRL lacks, by its `loss_type` field."""

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer  # noqa: E402
from trl_runs import MIXED  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.integrations.trl.loss import LossMixin  # noqa: E402
from fastgrpo.objective import Objective  # noqa: E402
from fastgrpo.ops.grpo_loss import grpo_loss  # noqa: E402
from fastgrpo.testing.trl import build_trainer, steps_of  # noqa: E402


@pytest.mark.parametrize(
    "loss_type", ["gmpo", "gspo_token", "dppo_tv", "dppo_kl", "gpg", "dro", "reinforce"]
)
def test_losses_trl_lacks_equal_the_formula_on_trl_log_probs(checkpoint, tmp_path, loss_type):
    """The second iteration on a batch, where ratios are not 1: loss and metrics."""
    options = dict(loss_type=loss_type, beta=0.04, num_iterations=2, max_steps=2, rows=MIXED)
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, **options)
    original, seen = LossMixin._fused_loss, []

    def spy(self, model, inputs):
        loss = original(self, model, inputs)
        table = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        prompt, prompt_mask, completion, mask = (inputs[name] for name in table)
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        with torch.no_grad():
            logps, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
                self,
                model,
                torch.cat([prompt, completion], 1),
                torch.cat([prompt_mask, mask], 1),
                completion.shape[1],
                **{name: inputs[name] for name in names},
            )
        kept = mask.bool()
        columns = {
            ours: inputs[theirs][kept]
            for ours, theirs in (
                ("old_logp", "old_per_token_logps"),
                ("ref_logp", "ref_per_token_logps"),
            )
        }
        obj = Objective(loss_type, beta=0.04, max_completion_length=6)
        seq_ids = kept.nonzero()[:, 0]
        plain = grpo_loss(logps[kept], inputs["advantages"], obj, seq_ids=seq_ids, **columns)
        seen.append((loss.item(), plain.loss.item(), plain.metrics))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossMixin, "_fused_loss", spy)
        trainer.train()
    assert len(seen) == 2 and any(abs(plain) > 1e-4 for _, plain, _ in seen)
    for (loss, plain, metrics), logged in zip(seen, steps_of(trainer), strict=True):
        assert loss == pytest.approx(plain, rel=1e-4, abs=1e-6)
        for name, value in metrics.items():
            if name == "kl" or name.startswith("clip_ratio"):
                assert logged[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
