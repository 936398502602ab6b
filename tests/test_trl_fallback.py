# SPDX-License-Identifier: Apache-2.0
"""What packed rows cannot express runs by TRL's own padded path, and says so once."""

import logging
from types import MethodType

import pytest
import torch

pytest.importorskip("trl")

import transformers  # noqa: E402
import trl  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from fastgrpo import InputError  # noqa: E402
from fastgrpo.integrations.trl import FastGRPOTrainer, accelerate  # noqa: E402
from fastgrpo.models import families  # noqa: E402
from fastgrpo.testing.models import VOCAB  # noqa: E402
from fastgrpo.testing.processors import tiny_tokenizer  # noqa: E402
from fastgrpo.testing.trl import build_trainer, save_checkpoint, steps_of  # noqa: E402

TEXT = [{"prompt": [{"role": "user", "content": f"find {i}"}]} for i in range(8)]
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    head_dim=8,
)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SAME = {"exact_zero_advantages": False}
METRICS = ("loss", "grad_norm", "reward", "entropy", "completions/mean_length")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def qwen2_5_vl(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2_5_vl")


def save_unserved(folder, name, **extra):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **extra)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    tiny_tokenizer(config).save_pretrained(folder)
    return folder


def equal_runs(checkpoint, tmp_path, caplog, metrics=METRICS, **options):
    """Bitwise TRL's numbers; returns the lines that fastgrpo logged."""
    options = {"rows": TEXT, "max_steps": 2, "generation_kwargs": None} | options
    runs = []
    for name, cls, extra in (("s", GRPOTrainer, {}), ("f", FastGRPOTrainer, {"fast": SAME})):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fastgrpo"):
            runs.append(build_trainer(cls, checkpoint, tmp_path / name, **extra, **options))
            runs[-1].train()
    stock, ours = map(steps_of, runs)
    assert len(stock) == len(ours) == options["max_steps"]
    for theirs, mine in zip(stock, ours, strict=True):
        assert {m: mine[m] for m in metrics} == {m: theirs[m] for m in metrics}
    return [r.getMessage() for r in caplog.records if r.name.startswith("fastgrpo")]


@pytest.mark.parametrize(
    ("name", "extra", "metrics"),
    [("Gemma", {}, METRICS), ("Mixtral", EXPERTS, (*METRICS, "aux_loss"))],
)
def test_a_family_that_is_not_served_trains_as_with_trl(tmp_path, caplog, name, extra, metrics):
    folder = save_unserved(tmp_path / "model", name, **extra)
    lines = equal_runs(folder, tmp_path, caplog, metrics)
    assert len(lines) == 1 and f"model type '{name.lower()}' is not served" in lines[0]
    assert "TRL's own padded forward" in lines[0] and "4 times" in lines[0]
    with pytest.raises(InputError, match=f"strict=True: model type '{name.lower()}'"):
        build_trainer(FastGRPOTrainer, folder, tmp_path, rows=TEXT, fast={"strict": True})


def test_the_family_is_judged_before_anything_else(tmp_path):
    folder = save_unserved(tmp_path / "model", "Gemma", attention_dropout=0.1)
    options = dict(rows=TEXT, cast_lm_head_to_fp32=True, generation_kwargs=None)
    trainer = build_trainer(GRPOTrainer, folder, tmp_path, **options)
    with pytest.raises(InputError, match="'gemma' is not served"):
        accelerate(trainer, strict=True)


def test_an_option_a_packed_row_lacks_trains_as_with_trl(qwen2, tmp_path, caplog):
    lines = equal_runs(qwen2, tmp_path, caplog, cast_lm_head_to_fp32=True)
    assert len(lines) == 1 and "cast_lm_head_to_fp32=True" in lines[0]


def test_dropout_is_judged_at_construction(qwen2, tmp_path, caplog):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    options = dict(rows=TEXT, beta=0.0, peft_config=lora, generation_kwargs=None, max_steps=1)
    lines = equal_runs(qwen2, tmp_path, caplog, **options)
    assert len(lines) == 1 and "lora_dropout" in lines[0]
    with pytest.raises(InputError, match="strict=True: dropout 0.1"):
        build_trainer(FastGRPOTrainer, qwen2, tmp_path, fast={"strict": True}, **options)


def test_prompt_learning_is_not_packed(qwen2, tmp_path):
    from peft import PrefixTuningConfig

    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(InputError, match="strict=True: PEFT .* adds virtual tokens"):
        build_trainer(
            FastGRPOTrainer, qwen2, tmp_path, rows=TEXT, beta=0.0, peft_config=prefix,
            fast={"strict": True},
        )  # fmt: skip


def test_a_class_that_inherits_its_forward_is_packed(qwen2, tmp_path, monkeypatch):
    """FSDP2 and remote code make subclasses; a forward from elsewhere is another matter."""
    stock = transformers.Qwen2ForCausalLM
    trainer = build_trainer(GRPOTrainer, qwen2, tmp_path, rows=TEXT, beta=0.0)
    trainer.model.__class__ = type("FSDPQwen2ForCausalLM", (stock,), {})
    accelerate(trainer, strict=True)

    forward = stock.forward
    monkeypatch.setattr(stock, "forward", lambda self, *args, **kwargs: forward(self, *args))
    trainer = build_trainer(GRPOTrainer, qwen2, tmp_path, rows=TEXT, beta=0.0)
    with pytest.raises(InputError, match="strict=True: Qwen2.*forward is .*test_trl_fallback"):
        accelerate(trainer, strict=True)


@pytest.fixture
def without_tool_images(monkeypatch):
    """As of a family that cannot have images inside a completion."""
    family = type(families()["qwen2_5_vl"])
    monkeypatch.setattr(family, "serves_images_in_completions", False)


def test_a_batch_with_images_of_a_tool_is_scored_by_trl_until_the_next(
    qwen2_5_vl, tmp_path, monkeypatch, without_tool_images
):
    trainer = build_trainer(FastGRPOTrainer, qwen2_5_vl, tmp_path)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, *a: ([[1]], None))
    trainer.model.train()
    assert trainer._unserved({}) is None
    trainer._generate_single_turn([[1]], None, {}, 1, has_tool_images=True)
    trainer._generate_single_turn([[1]], None, {}, 1, has_tool_images=True)
    assert "tool returned images" in trainer._unserved({})
    asked = []
    monkeypatch.setattr(
        GRPOTrainer, "_get_per_token_logps_and_entropies", lambda self, *a, **k: asked.append(a)
    )
    trainer._get_per_token_logps_and_entropies(trainer.model, "ids", "mask", 3, num_images=[1])
    assert asked == [(trainer.model, "ids", "mask", 3, None, False, False)]
    trainer.model.eval()
    assert trainer._unserved({}) is None  # an evaluation in between is another batch
    trainer.model.train()
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._generate_and_score_completions([])
    assert trainer._unserved({}) is None


def test_tools_of_a_vision_language_model_are_named_at_construction(
    qwen2_5_vl, tmp_path, caplog, without_tool_images
):
    trainer = build_trainer(GRPOTrainer, qwen2_5_vl, tmp_path)
    trainer.tools = [print]
    with pytest.raises(InputError, match="strict=True: tools of a vision-language model"):
        accelerate(trainer, strict=True)
    trainer = build_trainer(GRPOTrainer, qwen2_5_vl, tmp_path)
    trainer.tools = [print]
    with caplog.at_level(logging.WARNING, logger="fastgrpo"):
        accelerate(trainer)
    assert "a batch with one computes log-probabilities by TRL" in caplog.text


def test_tools_of_a_family_that_serves_their_images_are_packed(qwen2_5_vl, tmp_path):
    trainer = build_trainer(GRPOTrainer, qwen2_5_vl, tmp_path)
    trainer.tools = [print]
    accelerate(trainer, strict=True)
    assert trainer._padded_reason is None


def test_every_optimizer_step_has_a_gradient_when_one_group_is_live(qwen2, tmp_path):
    """Two steps of one generation: whole groups alone would leave one of them without any."""
    reward = {"find 0": lambda text: float(len(set(text)))}

    def one_live_group(prompts, completions, **columns):
        texts = [c[0]["content"] for c in completions]
        names = [p[-1]["content"] for p in prompts]
        return [reward.get(n, lambda t: 1.0)(t) for n, t in zip(names, texts, strict=True)]

    trainer = build_trainer(
        FastGRPOTrainer, qwen2, tmp_path, rows=TEXT[:2], reward=one_live_group, max_steps=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=2,
        beta=0.0, generation_kwargs=None,
    )  # fmt: skip
    trainer.train()
    assert all(step["grad_norm"] > 0 for step in steps_of(trainer))


@pytest.mark.parametrize("version", ["1.17.0", "2.0.0"])
def test_a_newer_trl_is_accepted_by_what_its_methods_take(
    qwen2, tmp_path, monkeypatch, caplog, version
):
    monkeypatch.setattr(trl, "__version__", version)
    with caplog.at_level(logging.WARNING, logger="fastgrpo"):
        build_trainer(FastGRPOTrainer, qwen2, tmp_path, rows=TEXT)
    lines = [r.getMessage() for r in caplog.records if "not been tested" in r.getMessage()]
    assert len(lines) == 1 and f"trl {version}" in lines[0]
    with pytest.raises(InputError, match="self_check=False with trl"):
        build_trainer(FastGRPOTrainer, qwen2, tmp_path, rows=TEXT, fast={"self_check": False})

    def _generate(self, prompts, environments):
        raise NotImplementedError

    monkeypatch.setattr(GRPOTrainer, "_generate", _generate)
    message = rf"trl {version} .*_generate is \(prompts, environments\), not \(prompts\)"
    with pytest.raises(InputError, match=message):
        build_trainer(FastGRPOTrainer, qwen2, tmp_path, rows=TEXT)


def test_a_forward_patched_over_the_fused_head_is_refused(qwen2, tmp_path):
    trainer = build_trainer(GRPOTrainer, qwen2, tmp_path, rows=TEXT)
    trainer.model.forward = MethodType(lambda self, **inputs: None, trainer.model)
    with pytest.raises(InputError, match="forward was patched"):
        accelerate(trainer)
