# SPDX-License-Identifier: Apache-2.0
"""The trainer logs what TRL logs: options, families, wrappers, evaluation."""

import pytest
import torch

pytest.importorskip("trl")

from trl_runs import IMAGES, MIXED, SAME_ROWS, StockTrainer, agree, train_both  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, save_checkpoint, steps_of  # noqa: E402

AGREE = {
    "text, image and two-image rows": {},
    "several steps per generation": dict(
        rows=IMAGES,
        per_device_train_batch_size=4,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        max_steps=3,
    ),
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "reentrant checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "temperature and padding multiple": dict(temperature=0.7, pad_to_multiple_of=8),
    "entropy bonus and quantile": dict(entropy_coef=0.01, top_entropy_quantile=0.5),
    "batch scaling": dict(scale_rewards="batch", loss_type="dr_grpo", delta=1.5),
    "truncated completions masked": dict(mask_truncated_completions=True, max_completion_length=24),
    "short rows": dict(fast=SAME_ROWS | {"max_tokens": 60}),
}


@pytest.mark.parametrize("case", AGREE)
def test_same_numbers_as_trl(checkpoint, tmp_path, case):
    train_both(checkpoint, tmp_path, **AGREE[case])


def test_same_numbers_when_groups_stay_together(checkpoint, tmp_path):
    """The rows of an optimizer step are TRL's; only their split into micro-batches is not."""
    options = dict(gradient_accumulation_steps=4, per_device_train_batch_size=4, num_iterations=2)
    metrics = ("loss", "grad_norm", "reward")
    train_both(checkpoint, tmp_path, metrics, fast=None, rows=IMAGES, **options)


def test_micro_batches_of_text_and_of_images(checkpoint, tmp_path):
    """Whole groups: a micro-batch of text rows alone, which stock TRL cannot run."""
    options = dict(rows=MIXED, max_steps=2)
    split = dict(gradient_accumulation_steps=2, per_device_train_batch_size=4)
    ours = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "f", **split, **options)
    ours.train()
    whole = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "w", **options)
    whole.train()
    agree(ours, whole, ("loss", "grad_norm", "reward"))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5", "llama"])
def test_other_families(tmp_path, family):
    other = save_checkpoint(tmp_path / family, family)
    rows = MIXED
    if family == "llama":
        rows = [{"prompt": row["prompt"]} for row in MIXED]
    train_both(other, tmp_path, rows=rows, max_steps=2)


def test_bfloat16_autocast(checkpoint, tmp_path):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, bf16=True)
    trainer.train()
    steps = steps_of(trainer)
    assert 0 < steps[0]["fastgrpo/self_check_max_abs"] < 0.5  # TRL rounds each logit
    assert all(0 < e["grad_norm"] < float("inf") for e in steps)


def test_peft(checkpoint, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    ours, _ = train_both(checkpoint, tmp_path, peft_config=lora, num_iterations=2)
    assert ours.ref_model is None  # the reference is the model without its adapter


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2", "qwen2", pad_is_eos=True)


def test_text_model_whose_pad_token_is_its_eos_token(text_checkpoint, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"find {i}"}]} for i in range(4)]
    ours, _ = train_both(
        text_checkpoint,
        tmp_path,
        rows=rows,
        max_steps=4,
        max_completion_length=32,
        generation_kwargs=None,
    )
    lengths = {entry["completions/min_length"] for entry in steps_of(ours)}
    assert min(lengths) < 32  # some completions did end


def test_several_eos_ids(checkpoint, tmp_path):
    options = dict(max_steps=3, max_completion_length=16)
    runs = []
    for cls, extra in ((StockTrainer, {}), (FastGRPOTrainer, {"fast": SAME_ROWS})):
        trainer = build_trainer(cls, checkpoint, tmp_path / cls.__name__, **extra, **options)
        trainer.eos_token_ids += [7, 8, 11, 15]
        trainer.generation_kwargs["eos_token_id"] = trainer.eos_token_ids
        trainer.generation_config.eos_token_id = trainer.eos_token_ids
        trainer.train()
        runs.append(trainer)
    stock, ours = runs
    agree(ours, stock)
    assert steps_of(ours)[0]["completions/min_length"] < 16


def test_evaluation_during_training(checkpoint, tmp_path):
    from datasets import Dataset

    options = dict(
        rows=MIXED,
        max_steps=2,
        eval_dataset=Dataset.from_list(MIXED[:3]),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
    )
    ours, stock = train_both(checkpoint, tmp_path, **options)
    for a, b in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert set(b) <= set(a)
        for key in ("eval_reward", "eval_kl", "eval_entropy", "eval_completions/mean_length"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_what_checkpointing_recomputes_changes_no_bit(checkpoint, tmp_path):
    calls, norms, weights = {}, {}, {}
    for keep in (True, False):
        trainer = build_trainer(
            FastGRPOTrainer,
            checkpoint,
            tmp_path / str(keep),
            fast={"keep_activations": keep},
            rows=IMAGES,
            gradient_checkpointing=True,
            max_steps=3,
        )
        calls[keep] = 0

        def count(module, *_, keep=keep):
            calls[keep] += module.training

        last = trainer.model.model.language_model.layers[-1]
        last.mlp.act_fn.register_forward_hook(count)
        trainer.train()
        norms[keep] = [step["grad_norm"] for step in steps_of(trainer)]
        weights[keep] = trainer.model.state_dict()
    assert calls[True] < calls[False]
    assert norms[True] == norms[False]
    assert all(torch.equal(x, weights[False][name]) for name, x in weights[True].items())
