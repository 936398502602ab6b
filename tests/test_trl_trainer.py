# SPDX-License-Identifier: Apache-2.0
"""FastGRPOTrainer beyond plain parity: mixed batches, masks, failures, resume, refusals."""

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from fastgrpo import InputError  # noqa: E402
from fastgrpo.advantages.rule import AdvantageRule  # noqa: E402
from fastgrpo.engine import SelfCheckError  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer, FastOptions, accelerate  # noqa: E402
from fastgrpo.integrations.trl.loss import LossMixin  # noqa: E402
from fastgrpo.objective import Objective  # noqa: E402
from fastgrpo.ops.grpo_loss import grpo_loss  # noqa: E402
from fastgrpo.testing.models import IMAGE_ID, VIDEO_ID  # noqa: E402
from fastgrpo.testing.trl import (  # noqa: E402
    build_trainer,
    distinct_characters,
    image_row,
    save_checkpoint,
    steps_of,
)

MIXED = [image_row(0, 1), image_row(1, 0), image_row(2, 2), image_row(3, 1)]
# TRL's own shuffle and its residue in equal groups, where numbers are compared with TRL's.
SAME_ROWS = {"keep_groups": False, "exact_zero_advantages": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2", "qwen2", pad_is_eos=True)


class StockTrainer(GRPOTrainer):
    """TRL's trainer, with [] instead of None for the images of a text row, as processors need."""

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        return prompt_ids, images and [row or [] for row in images], fields


def agree(ours, theirs, metrics=("loss", "grad_norm", "reward", "kl", "entropy")):
    ours, theirs = steps_of(ours), steps_of(theirs)
    assert len(ours) == len(theirs) > 0
    for metric in metrics:
        a, b = ([entry[metric] for entry in run if metric in entry] for run in (ours, theirs))
        assert len(a) == len(b) > 0, metric
        scale = max(map(abs, b))
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-4 * scale, metric


def train_both(checkpoint, tmp_path, metrics=None, fast=SAME_ROWS, **options):
    options = {"max_steps": 4, "rows": MIXED} | options
    runs = []
    for name, cls, extra in (("s", StockTrainer, {}), ("f", FastGRPOTrainer, {"fast": fast})):
        runs.append(build_trainer(cls, checkpoint, tmp_path / name, **extra, **options))
        runs[-1].train()
    stock, ours = runs
    agree(ours, stock, *([metrics] if metrics else []))
    return ours, stock


IMAGES = [image_row(i) for i in range(4)]  # stock TRL cannot take a micro-batch of text rows alone
AGREE = {
    "text, image and two-image rows": {},
    "accumulation": dict(rows=IMAGES, gradient_accumulation_steps=4, per_device_train_batch_size=4),
    "several steps per generation": dict(
        rows=IMAGES,
        per_device_train_batch_size=4,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
    ),
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "reentrant checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "temperature": dict(temperature=0.7),
    "padding multiple": dict(pad_to_multiple_of=8),
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


def test_a_group_stays_in_one_micro_batch_and_is_encoded_once(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path,
        max_steps=2,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=4,
        fast={"self_check": False},
    )
    prompts = []
    original = trainer._compute_loss

    def spy(model, inputs):
        rows = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        ]
        prompts.append(set(rows))
        return original(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert [len(group) for group in prompts] == [1] * 8


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


def test_text_model_whose_pad_token_is_its_eos_token(text_checkpoint, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"find {i}"}]} for i in range(4)]
    ours, _ = train_both(
        text_checkpoint, tmp_path, rows=rows, max_completion_length=32, generation_kwargs=None
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


def test_a_batch_with_every_completion_masked_is_a_zero_step(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path,
        max_steps=2,
        mask_truncated_completions=True,
        generation_kwargs={"suppress_tokens": [IMAGE_ID, VIDEO_ID, 0, 1]},
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert [(e["loss"], e["grad_norm"]) for e in steps_of(trainer)] == [(0.0, 0.0)] * 2
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("placeholder", [IMAGE_ID, VIDEO_ID])
def test_a_sampled_placeholder_is_left_out_of_the_loss_and_counted(
    checkpoint, tmp_path, monkeypatch, placeholder
):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, rows=MIXED)
    generate, losses = trainer._generate_single_turn, []
    compute_loss = trainer._compute_loss

    def with_placeholders(*args, **kwargs):
        completions, logprobs = generate(*args, **kwargs)
        for ids in completions[::2]:
            ids[1] = placeholder
        return completions, logprobs

    def spy(model, inputs):
        sampled = inputs["completion_ids"] == placeholder
        losses.append((int(sampled.sum()), int((sampled & (inputs["tool_mask"] == 0)).sum())))
        assert (inputs["ref_per_token_logps"][sampled] == 0).all()
        kept = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
        assert inputs["num_items_in_batch"] == kept
        return compute_loss(model, inputs)

    monkeypatch.setattr(trainer, "_generate_single_turn", with_placeholders)
    monkeypatch.setattr(trainer, "_compute_loss", spy)
    trainer.train()
    assert losses == [(4, 4)] * 2
    for entry in steps_of(trainer):
        assert entry["fastgrpo/sampled_placeholders"] == 4
        assert 0 < entry["grad_norm"] < float("inf")


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


def equal_rewards(value):
    return lambda completions, **columns: [value] * len(completions)


@pytest.mark.parametrize("value", [0.9, 100.1, 10000.1])
def test_equal_rewards_give_advantages_of_exactly_zero(checkpoint, tmp_path, value):
    options = dict(max_steps=1, beta=0.0, num_generations=8, reward=equal_rewards(value))
    ours = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path / "f",
        log_completions=True,
        num_completions_to_print=0,
        **options,
    )
    ours.train()
    assert steps_of(ours)[0]["grad_norm"] == 0.0
    assert steps_of(ours)[0]["fastgrpo/frac_nonzero_advantage"] == 0.0
    assert set(ours._logs["advantages"]) == {0.0}
    as_trl = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path / "t",
        fast={"exact_zero_advantages": False},
        **options,
    )
    as_trl.train()
    assert steps_of(as_trl)[0]["grad_norm"] > 0.0  # TRL's residue moves the policy


def test_unequal_groups_keep_their_advantages(checkpoint, tmp_path):
    def one_equal_group(completions, **columns):
        return [0.9] * 4 + [0.1, 0.9, 0.5, 0.5]

    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, reward=one_equal_group
    )
    trainer.train()
    advantages = list(trainer._logs["advantages"])
    assert advantages[:4] == [0.0] * 4
    assert advantages[4] < -1 < 1 < advantages[5]


@pytest.mark.parametrize(
    "options",
    [
        dict(loss_type="grpo"),
        dict(loss_type="vespo", rule=AdvantageRule()),
        dict(loss_type="gmpo"),
        dict(loss_type="dapo", top_entropy_quantile=0.5),  # TRL's loss on per-token values
    ],
    ids=["grpo", "vespo-rule", "gmpo", "per-token"],
)
def test_groups_without_gradient_are_scored_without_backward(
    checkpoint, tmp_path, monkeypatch, options
):
    from fastgrpo.integrations.trl import loss as fused
    from fastgrpo.integrations.trl import trainer as per_token

    def first_group_equal(completions, **columns):
        return [0.5] * 4 + distinct_characters(completions)[4:]

    with_gradient = []

    def counting(function, argument):
        def spy(*args, **kwargs):
            if torch.is_grad_enabled():
                with_gradient.append(len(args[argument]))
            return function(*args, **kwargs)

        return spy

    monkeypatch.setattr(fused, "loss_of_groups", counting(fused.loss_of_groups, 2))
    monkeypatch.setattr(per_token, "score", counting(per_token.score, 1))
    options |= dict(max_steps=2, beta=0.0, rows=IMAGES, reward=first_group_equal)
    runs = []
    for skip in (True, False):
        fast = {"skip_zero_gradient": skip, "self_check": False}  # which scores two rows more
        runs.append(build_trainer(FastGRPOTrainer, checkpoint, tmp_path, fast=fast, **options))
        torch.manual_seed(0)
        runs[-1].train()
    agree(*runs, ("loss", "grad_norm", "entropy"))
    assert with_gradient == [4] * 2 + [8] * 2


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


def test_every_group_without_gradient_is_a_zero_step(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, beta=0.0, reward=equal_rewards(0.5)
    )
    trainer.train()
    assert [(e["loss"], e["grad_norm"]) for e in steps_of(trainer)] == [(0.0, 0.0)] * 2
    assert all(e["entropy"] > 0 for e in steps_of(trainer))


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


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("peft", [False, True])
def test_resume_continues_as_if_never_stopped(checkpoint, tmp_path, peft):
    from peft import LoraConfig

    options = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    if peft:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "fc1", "up_proj"])
    whole = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "whole", **options)
    whole.train()
    parts = tmp_path / "parts"
    build_trainer(FastGRPOTrainer, checkpoint, parts, callbacks=[Stop()], **options).train()
    second = build_trainer(FastGRPOTrainer, checkpoint, parts, **options)
    second.train(resume_from_checkpoint=str(parts / "checkpoint-2"))
    assert [e["loss"] for e in steps_of(second)] == [e["loss"] for e in steps_of(whole)]
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_is_what_from_pretrained_loads(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    reloaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    for a, b in zip(reloaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_best_model_is_loaded_at_the_end(checkpoint, tmp_path):
    from datasets import Dataset

    scores = iter([5.0, 1.0])

    def reward(completions, **columns):
        return (
            [next(scores, 0.0)] * len(completions)
            if len(completions) == 2
            else (distinct_characters(completions))
        )

    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path,
        max_steps=2,
        reward=reward,
        eval_dataset=Dataset.from_list([image_row(0)]),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        num_generations_eval=2,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
    )
    trainer.train()
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    for a, b in zip(best.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accelerate_changes_an_instance_of_any_subclass(checkpoint, tmp_path):
    class MyTrainer(StockTrainer):
        def log(self, logs, *args):
            super().log(logs | {"mine": 1.0}, *args)

    options = dict(max_steps=2)
    stock = build_trainer(GRPOTrainer, checkpoint, tmp_path / "s", **options)
    stock.train()
    trainer = build_trainer(GRPOTrainer, checkpoint, tmp_path / "f", **options)
    assert accelerate(trainer, **SAME_ROWS) is trainer
    assert isinstance(trainer, FastGRPOTrainer)
    trainer.train()
    agree(trainer, stock)

    with pytest.raises(InputError, match="_tokenize_prompts is not TRL's own"):
        accelerate(build_trainer(MyTrainer, checkpoint, tmp_path / "m", **options))


def test_accelerate_keeps_a_subclass_methods(checkpoint, tmp_path):
    class MyTrainer(GRPOTrainer):
        def log(self, logs, *args):
            super().log(logs | {"mine": 1.0}, *args)

    trainer = accelerate(build_trainer(MyTrainer, checkpoint, tmp_path, max_steps=1))
    assert type(trainer).__name__ == "FastMyTrainer" and isinstance(trainer, MyTrainer)
    trainer.train()
    assert steps_of(trainer)[0]["mine"] == 1.0
    assert "fastgrpo/self_check_max_abs" in steps_of(trainer)[0]
    with pytest.raises(InputError, match="accelerated already"):
        accelerate(trainer)


def test_a_subclass_of_ours_may_override_what_we_override(checkpoint, tmp_path):
    class Doubled(FastGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | {"advantages": 2 * output["advantages"]}

    runs = [
        build_trainer(cls, checkpoint, tmp_path, max_steps=1, beta=0.0)
        for cls in (FastGRPOTrainer, Doubled)
    ]
    norms = []
    for trainer in runs:
        torch.manual_seed(0)
        trainer.train()
        norms.append(steps_of(trainer)[0]["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)


@pytest.mark.parametrize("path", ["fused", "per-token"])
def test_the_self_check_stops_a_run_whose_numbers_differ(checkpoint, tmp_path, monkeypatch, path):
    from fastgrpo.integrations.trl import loss as fused
    from fastgrpo.integrations.trl import trainer as per_token

    def shifted(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            for group in getattr(result, "scores", result):
                group.logp = [logp + 0.01 for logp in group.logp]
            return result

        return call

    options = dict(max_steps=1, beta=0.0)
    if path == "fused":
        monkeypatch.setattr(fused, "loss_of_groups", shifted(fused.loss_of_groups))
    else:
        monkeypatch.setattr(per_token, "score", shifted(per_token.score))
        options["top_entropy_quantile"] = 0.5
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "checked", **options)
    with pytest.raises(RuntimeError, match="differ from TRL's on the first micro-batch.* max 0.01"):
        trainer.train()
    assert trainer.state.global_step == 0
    unchecked = {"self_check": False}
    build_trainer(FastGRPOTrainer, checkpoint, tmp_path / "not", fast=unchecked, **options).train()


def test_the_self_check_stops_a_run_whose_gradient_is_cut(checkpoint, tmp_path):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, beta=0.0)

    def cut(module, args, kwargs, output):
        return output.detach() if kwargs.get("fg_layout") is not None else output

    layer = trainer.model.model.language_model.layers[1]
    layer.register_forward_hook(cut, with_kwargs=True)
    with pytest.raises(SelfCheckError, match="does not arrive through the packed row"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_self_check_compares_the_loss_itself(checkpoint, tmp_path, monkeypatch):
    from fastgrpo.integrations.trl.loss import LossMixin

    right = LossMixin._denominators
    monkeypatch.setattr(
        LossMixin, "_denominators", lambda *args: right(*args) | {"num_tokens": 3.0}
    )
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, max_steps=2, num_iterations=2, beta=0.04
    )
    trainer.ref_model.lm_head.weight.data.mul_(1.1)  # a loss that is not zero at once
    with pytest.raises(RuntimeError, match="fused loss of the first micro-batch"):
        trainer.train()
    assert trainer.state.global_step == 0


def liger_forward(self, *args, **kwargs):
    raise NotImplementedError


liger_forward.__module__ = "liger_kernel.transformers.model.qwen2_5_vl"


def patch_model(trainer):
    trainer.model.forward = liger_forward.__get__(trainer.model)


def patch_trainer(trainer):
    trainer._calculate_rewards = lambda *args: None


def patch_class(trainer):
    cls = type(trainer)
    trainer.__class__ = type("Patched", (cls,), {"_prepare_inputs": liger_forward})


REFUSALS = {
    "forward was patched .*liger_kernel": ({}, patch_model),
    "_calculate_rewards is not TRL's own": ({}, patch_trainer),
    "_prepare_inputs is not TRL's own .*liger_kernel": ({}, patch_class),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_would_change_the_numbers_is_refused(checkpoint, tmp_path, message):
    options, patch = REFUSALS[message]
    trainer = build_trainer(GRPOTrainer, checkpoint, tmp_path, **options)
    if patch:
        patch(trainer)
    with pytest.raises(InputError, match=message):
        accelerate(trainer)


def test_a_model_class_patched_before_trl_saw_it_is_not_packed(checkpoint, tmp_path, monkeypatch):
    from transformers import Qwen2_5_VLForConditionalGeneration

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "forward", liger_forward)
    with pytest.raises(InputError, match="strict=True: .*liger_kernel.*not the model's own"):
        build_trainer(FastGRPOTrainer, checkpoint, tmp_path, beta=0.0, fast={"strict": True})


def test_options_are_checked(checkpoint, tmp_path):
    trainer = build_trainer(GRPOTrainer, checkpoint, tmp_path)
    with pytest.raises(InputError, match="unknown option maxtokens; the options are max_tokens"):
        accelerate(trainer, maxtokens=3)
    with pytest.raises(InputError, match="expected a trl.GRPOTrainer, got int"):
        accelerate(3)
    with pytest.raises(InputError, match="liger_kernels=True needs a CUDA device"):
        accelerate(trainer, liger_kernels=True)
    with pytest.raises(InputError, match="backend"):
        build_trainer(
            FastGRPOTrainer, checkpoint, tmp_path, max_steps=1, fast=FastOptions(backend="none")
        ).train()


def test_nothing_is_logged_by_a_healthy_run(checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fastgrpo"):
        build_trainer(FastGRPOTrainer, checkpoint, tmp_path, max_steps=1).train()
    assert [record for record in caplog.records if record.name.startswith("fastgrpo")] == []
