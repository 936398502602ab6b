# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of a mixture of experts under TRL: from packed rows, TRL's numbers."""

import pytest

pytest.importorskip("trl")

from trl_runs import SAME_ROWS, compare  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.models import tiny_config  # noqa: E402
from fastgrpo.testing.trl import build_trainer, save_checkpoint, steps_of  # noqa: E402

TEXT = [{"prompt": [{"role": "user", "content": f"find {i}"}]} for i in range(8)]
WEIGHT = {"router_aux_loss_coef": 0.5, "rows": TEXT, "max_steps": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen3_moe", "qwen3_moe")


CASES = {
    "accumulation and activation checkpointing": dict(
        gradient_accumulation_steps=2, num_iterations=2, gradient_checkpointing=True
    ),
    "rows without a completion token, short packed rows": dict(
        mask_truncated_completions=True,
        max_completion_length=24,
        fast=SAME_ROWS | {"max_tokens": 60},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_trl(checkpoint, tmp_path, case):
    stock, *ours = compare(checkpoint, tmp_path, **WEIGHT, **CASES[case])
    for run in ours:
        assert run._padded_reason is None
        assert all(entry["aux_loss"] > 0 for entry in steps_of(run))


def test_a_mixture_of_a_vision_language_model(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "model", "qwen3_vl_moe")
    text = tiny_config("qwen3_vl_moe").text_config
    if not hasattr(text, "output_router_logits"):  # transformers 5.17
        pytest.skip("TRL balances the routers of a model whose config can return their logits")
    compare(checkpoint, tmp_path, ("fused",), router_aux_loss_coef=0.5, max_steps=1)


def test_a_loss_trl_lacks_is_balanced_too(checkpoint, tmp_path):
    """Advantages of 0 leave only the balance to move the weights."""
    runs = []
    for name, coef in (("with", 0.5), ("without", 0.0)):
        options = WEIGHT | {"router_aux_loss_coef": coef, "max_steps": 1, "beta": 0.0}
        trainer = build_trainer(
            FastGRPOTrainer,
            checkpoint,
            tmp_path / name,
            loss_type="reinforce",
            reward=lambda completions, **columns: [1.0] * len(completions),
            **options,
        )
        trainer.train()
        runs.append(steps_of(trainer)[0])
    balanced, plain = runs
    assert balanced["grad_norm"] > 0.0 and plain["grad_norm"] == 0.0
    assert balanced["loss"] == pytest.approx(0.5 * balanced["aux_loss"], rel=1e-5)
