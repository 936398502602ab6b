"""Packed rollouts inside TRL's trainer."""

import pytest
import torch
from transformers import GenerationConfig

from fastgrpo import InputError
from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.integrations.trl.rollout import check_sampling, sample_rows
from fastgrpo.testing import models
from fastgrpo.testing.trl import build_trainer, image_row, save_checkpoint, steps_of

MIXED = [image_row(0, 1), image_row(1, 0), image_row(2, 2), image_row(3, 1)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2_5_vl")


def test_greedy_rollouts_are_those_of_trl(checkpoint, tmp_path):
    """With one choice per token both samplers must train on the same completions."""
    runs = []
    for packed in (False, True):
        trainer = build_trainer(
            FastGRPOTrainer, checkpoint, tmp_path / str(packed), rows=MIXED, max_steps=3,
            fast={"packed_rollout": packed}, top_k=1,
        )  # fmt: skip
        trainer.train()
        runs.append(steps_of(trainer))
    for stock, ours in zip(*runs, strict=True):
        for name in ("completions/mean_length", "reward", "entropy", "kl"):
            assert ours[name] == pytest.approx(stock[name], rel=1e-4, abs=1e-6), name


def test_each_prompt_is_prefilled_once(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer,
        checkpoint,
        tmp_path,
        rows=[image_row(0), image_row(1)],
        fast={"packed_rollout": True},
    )
    patches = []
    trainer.model.model.visual.register_forward_pre_hook(
        lambda m, args, kwargs: patches.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    output = trainer._generate_and_score_completions(rows)
    grids = output["image_grid_thw"].split(output["num_images"])
    own = [int(g.prod(-1).sum()) for g in grids]  # of each row; four rows share a prompt
    assert own[:4] == [own[0]] * 4 and own[4:] == [own[4]] * 4
    assert patches[0] == own[0] + own[4]  # later calls score the completions


def test_rows_with_equal_prompts_and_other_images_stay_apart():
    model = models.tiny_model("qwen2_5_vl")
    first, second = (
        models.synthetic_groups(model, [([(4, 6)], 5, [])], seed=seed)[0] for seed in (1, 2)
    )
    ids = first.prompt_ids.tolist()
    fields = {
        key: torch.cat([g.vision[key] for g in (first, second, first)]) for key in first.vision
    }
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    options = dict(max_tokens=None, backend=None)
    a, b, again = sample_rows(model, [ids] * 3, fields, [1, 1, 1], config, [], **options)
    assert a == again and a != b
    text = sample_rows(model, [[1, 2], [1, 2, 3]], {}, None, config, [], **options)
    assert [len(t) for t in text] == [6, 6]


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 1.05}, {"num_beams": 2}, {"min_p": 0.1}]
)
def test_settings_without_a_packed_form_are_refused(setting):
    check_sampling(GenerationConfig(do_sample=True, temperature=0.7, top_k=5))
    with pytest.raises(InputError, match=next(iter(setting))):
        check_sampling(GenerationConfig(**setting))


def test_vllm_and_tools_are_refused(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, rows=MIXED, fast={"packed_rollout": True}
    )
    with pytest.raises(InputError, match="packed_rollout"):
        trainer._generate_single_turn([[1]], None, {}, 1, has_tool_images=True)
