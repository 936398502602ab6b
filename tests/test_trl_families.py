# SPDX-License-Identifier: Apache-2.0
"""Every family in the trainer: the numbers of stock TRL with the same seeds.

Five steps of every family are slow tests; two steps of one family of each layout run always. Adam
makes whole steps of the rounding of a gradient that is zero, so runs in float32 descend by SGD, and
those under AdamW are in float64.
"""

import contextlib

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import SAME_ROWS, StockTrainer, deviation  # noqa: E402

from fastgrpo import models  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing import models as tm  # noqa: E402
from fastgrpo.testing.processors import tiny_processor  # noqa: E402
from fastgrpo.testing.trl import build_trainer, image_row, save_checkpoint, steps_of  # noqa: E402

CORE = ("gemma3", "internvl", "llava_next", "smolvlm")
# TRL 1.16 calls a completion part of the prompt for PaliGemma, whose prompts see both ways, and has
# no argument for the batch_num_images of LLaVA-OneVision and the target_sizes of MiniCPM-V.
NOT_BY_TRL = ("llava_onevision", "minicpmv4_6", "minicpmv4_7", "paligemma")
TRAINED = [family for family in tm.FAMILIES if family not in NOT_BY_TRL]
FIVE = [pytest.param(family, 5, marks=pytest.mark.slow) for family in TRAINED]
STEPS = [(family, 2) for family in CORE] + FIVE


@contextlib.contextmanager
def float64_run(*models):
    """Inside, these models train in float64."""
    for model in models:
        model.double()
        if hasattr(model.config.get_text_config(), "num_experts"):
            model.set_experts_implementation("eager")  # torch._grouped_mm has no float64
    torch.set_default_dtype(torch.float64)
    try:
        with tm.float64_norms():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def train_both(family, tmp_path, rows, wide=False, **options):
    """TRL's run and ours; the largest relative difference of a logged number."""
    checkpoint = save_checkpoint(tmp_path / family, family)
    runs, config = [], tm.tiny_config(family)
    options["optim"] = "adamw_torch" if wide else "sgd"
    if hasattr(config.get_text_config(), "router_aux_loss_coef"):
        options["router_aux_loss_coef"] = 0.0
    placeholders = models.families()[family].placeholders(config)
    options["generation_kwargs"] = {"suppress_tokens": list(placeholders) or None}
    for cls, fast in ((StockTrainer, {}), (FastGRPOTrainer, {"fast": SAME_ROWS})):
        if family in tm.VLM_FAMILIES:  # with sizes of its own: a class may not load by its name
            options["processor"] = tiny_processor(config)
        trainer = build_trainer(
            cls, checkpoint, tmp_path / cls.__name__, rows=rows, **fast, **options
        )
        trained = [model for model in (trainer.model, trainer.ref_model) if model is not None]
        with float64_run(*trained) if wide else contextlib.nullcontext():
            trainer.train()
        runs.append(trainer)
    stock, ours = runs
    assert ours._padded_reason is None
    assert any(entry["grad_norm"] > 0 for entry in steps_of(stock))
    return deviation(ours, stock)


def rows_for(family):
    """Prompts of one image and of two, or of text."""
    if family in tm.VLM_FAMILIES:
        return [image_row(i, 1 + i % 2) for i in range(4)]
    return [{"prompt": [{"role": "user", "content": f"find {i}"}]} for i in range(4)]


@pytest.mark.parametrize("family, steps", STEPS)
def test_same_numbers_as_trl(family, steps, tmp_path, record_property):
    worst = train_both(family, tmp_path, rows_for(family), max_steps=steps)
    record_property("worst", worst)
    assert worst <= 1e-4


@pytest.mark.parametrize("family, steps", [("llava", 2), *FIVE])
def test_same_numbers_as_trl_under_adamw(family, steps, tmp_path, record_property):
    worst = train_both(family, tmp_path, rows_for(family), wide=True, max_steps=steps)
    record_property("worst", worst)
    assert worst <= 1e-9


@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_lora_on_a_hybrid(family, tmp_path):
    from peft import LoraConfig

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["in_proj_.*", "out_proj", "q_proj", "v_proj"])
    options = {"max_steps": 2, "peft_config": lora}
    assert train_both(family, tmp_path, rows_for(family), **options) <= 1e-4
