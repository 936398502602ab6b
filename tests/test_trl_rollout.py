# SPDX-License-Identifier: Apache-2.0
"""Packed rollouts inside TRL's trainer."""

import copy
from unittest.mock import Mock

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin
from trl import GRPOTrainer

from fastgrpo import InputError
from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.integrations.trl.rollout import (
    effective_settings,
    packed_settings,
    sample_rows,
    unserved_setting,
)
from fastgrpo.testing import models
from fastgrpo.testing.trl import build_trainer, image_row, steps_of

MIXED = [image_row(0, 1), image_row(1, 0), image_row(2, 2), image_row(3, 1)]


def test_greedy_rollouts_are_those_of_trl(checkpoint, tmp_path):
    """With one choice per token both samplers must train on the same completions."""
    runs = []
    for packed in (False, None):
        trainer = build_trainer(
            FastGRPOTrainer, checkpoint, tmp_path / str(packed), rows=MIXED, max_steps=3,
            fast={"packed_rollout": packed}, top_k=1,
        )  # fmt: skip
        trainer.train()
        runs.append(steps_of(trainer))
    for stock, ours in zip(*runs, strict=True):
        for name in ("completions/mean_length", "reward", "entropy", "kl"):
            assert ours[name] == pytest.approx(stock[name], rel=1e-4, abs=1e-6), name


def test_sampled_rollouts_are_those_of_trl(checkpoint, tmp_path):
    """Whole groups in order take the random numbers that TRL's rows take."""
    runs = []
    for packed in (False, True):
        trainer = build_trainer(
            FastGRPOTrainer, checkpoint, tmp_path / str(packed), rows=MIXED, max_steps=2,
            fast={"packed_rollout": packed}, min_p=0.02, repetition_penalty=1.2, top_p=0.9,
        )  # fmt: skip
        trainer.train()
        runs.append(steps_of(trainer))
    for stock, ours in zip(*runs, strict=True):
        for name in ("completions/mean_length", "reward", "reward_std", "entropy", "kl"):
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
    settings = effective_settings(model, config)
    a, b, again = sample_rows(model, [ids] * 3, fields, [1, 1, 1], settings)
    assert a == again and a != b
    text = sample_rows(model, [[1, 2], [1, 2, 3]], {}, None, settings)
    assert [len(t) for t in text] == [6, 6]


UNSERVED = {
    "min_length": 500,
    "begin_suppress_tokens": list(range(60)),
    "sequence_bias": [[[7], 100.0]],
    "guidance_scale": 2.0,
    "top_h": 0.5,
    "forced_eos_token_id": 1,
    "max_time": 1e-4,
    "watermarking_config": {"bias": 10.0},
    "num_beams": 2,
    "typical_p": 0.5,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[7]],
    "renormalize_logits": True,
    "eos_token_id": 5,
    "cache_implementation": "static",
    "encoder_repetition_penalty": 1.2,
    "a_setting_of_tomorrow": 1,
    "max_new_tokens": None,
}


@pytest.mark.parametrize("name", UNSERVED)
def test_a_setting_that_packed_rows_would_drop_is_found(name):
    model = models.tiny_model("qwen2")
    given = {"max_new_tokens": 6, "eos_token_id": [3, 4]}
    config = GenerationConfig(**(given | {name: UNSERVED[name]}))
    found = unserved_setting(effective_settings(model, config), [3, 4])
    assert found.startswith(f"{name}="), found
    if name not in given:  # the checkpoint's own settings count as well
        setattr(model.generation_config, name, getattr(config, name))
        settings = effective_settings(model, GenerationConfig(**given))
        assert unserved_setting(settings, [3, 4]) == found


def test_every_field_of_a_generation_config_is_obeyed_or_found():
    """Also those a later transformers adds: a value nobody expects must not pass in silence."""
    model = models.tiny_model("qwen2")
    served = {"do_sample", "min_new_tokens", "stop_strings", "suppress_tokens", "temperature"}
    served |= {"top_k", "top_p", "min_p", "repetition_penalty"}
    settings = effective_settings(model, GenerationConfig(max_new_tokens=6, eos_token_id=3))
    assert unserved_setting(settings, [3]) is None
    passing = set()
    for name in vars(settings):
        if not name.startswith("_") and name != "eos_token_id":
            changed = copy.copy(settings)
            setattr(changed, name, object())
            if unserved_setting(changed, [3]) is None:
                passing.add(name)
    harmless = {"pad_token_id", "bos_token_id", "disable_compile", "transformers_version"}
    assert passing == served | harmless | {"max_new_tokens", "max_length"}


def test_default_rollouts_are_packed_and_the_rest_is_said_once(
    checkpoint, tmp_path, caplog, monkeypatch
):
    calls, sample = [], GenerationMixin._sample
    settings = {"suppress_tokens": [models.IMAGE_ID, models.VIDEO_ID]}

    def run(name, **extra):
        options = dict(rows=MIXED, max_steps=2, beta=0.0, generation_kwargs=settings | extra)
        trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path / name, **options)
        monkeypatch.setattr(
            GenerationMixin, "_sample", lambda *a, **k: calls.append(name) or sample(*a, **k)
        )
        with caplog.at_level("WARNING", logger="fastgrpo"):
            trainer.train()
        lines = [r.getMessage() for r in caplog.records if "packed rollout" in r.getMessage()]
        caplog.clear()
        return lines, steps_of(trainer)

    assert run("plain")[0] == [] and calls == []
    lines, steps = run("minimum", min_new_tokens=6)
    assert lines == [] and calls == []
    assert all(step["completions/min_length"] == 6 for step in steps)
    lines, steps = run("strings", stop_strings=list("abcdefghijklmnopqrstuvwxyz0123456789"))
    assert lines == [] and calls == []
    assert all(step["completions/mean_length"] < 6 for step in steps)
    lines, steps = run("time", max_time=1e-4)
    assert len(lines) == 1 and "max_time=0.0001 is not implemented" in lines[0]
    assert calls == ["time", "time"] and all(s["completions/max_length"] == 1 for s in steps)


def test_packed_rollout_true_refuses_and_false_is_off(checkpoint, tmp_path, monkeypatch):
    def stock(self, input_ids, *args, **kwargs):
        return torch.cat([input_ids, torch.full((2, 1), 77)], 1)

    monkeypatch.setattr(GenerationMixin, "_sample", stock)

    def rollout(fast, **kwargs):
        trainer = build_trainer(
            FastGRPOTrainer, checkpoint, tmp_path, rows=MIXED, fast={"packed_rollout": fast},
            generation_kwargs=kwargs,
        )  # fmt: skip
        return trainer._generate_single_turn([[1, 2]] * 2, None, {}, 2, has_tool_images=False)[0]

    assert rollout(False) == [[77], [77]]
    assert rollout(None, guidance_scale=1.5) == [[77], [77]]
    with pytest.raises(InputError, match="packed_rollout=True: guidance_scale=1.5"):
        rollout(True, guidance_scale=1.5)
    assert rollout(True) != [[77], [77]]


def test_a_trainer_made_without_its_constructor_dispatches_as_trl(monkeypatch):
    """TRL's own tests build one with `object.__new__` and ask what its rollout function gives."""
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda self, prompts: (prompts, "rolled out"))
    trainer = object.__new__(FastGRPOTrainer)
    assert trainer._generate(["prompt"]) == (["prompt"], "rolled out")


def test_a_class_with_a_generate_of_its_own_keeps_it(checkpoint, tmp_path, monkeypatch):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, rows=MIXED)
    assert packed_settings(trainer, False)[1] is None
    trainer.model.generate = Mock()
    assert "generate is not transformers' own" in packed_settings(trainer, False)[1]
    del trainer.model.generate
    monkeypatch.setattr(GenerationMixin, "generate", Mock())
    assert "generate is not transformers' own" in packed_settings(trainer, False)[1]


def test_other_engines_and_tools_with_images_are_not_packed(checkpoint, tmp_path):
    trainer = build_trainer(FastGRPOTrainer, checkpoint, tmp_path, rows=MIXED)
    assert packed_settings(trainer, False)[1] is None
    assert "tool" in packed_settings(trainer, True)[1]
    for name in ("use_transformers_continuous_batching", "use_vllm"):
        setattr(trainer, name, True)
        assert name in packed_settings(trainer, False)[1]
        setattr(trainer, name, False)


def test_continuous_batching_finds_the_attention_it_knows_at_every_step(checkpoint, tmp_path):
    trainer = build_trainer(
        FastGRPOTrainer, checkpoint, tmp_path, rows=MIXED, max_steps=2, beta=0.04
    )
    trainer.use_transformers_continuous_batching = True
    trainer.continuous_batching_config = None
    seen = []

    class Output:
        generated_tokens = [5, 6]

    def generate_batch(prompts, **kwargs):
        seen.append(trainer.model.config.text_config._attn_implementation)
        return {str(i): Output for i in range(len(prompts))}

    trainer.model.generate_batch = generate_batch
    trainer.train()
    assert seen == ["sdpa", "sdpa"]
