# SPDX-License-Identifier: Apache-2.0
"""Every recipe: a well-formed file, rewards that tell good from bad, three steps that train."""

import json
import runpy
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from fastgrpo import recipes
from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.recipes.rewards import _fill, build_reward
from fastgrpo.testing import models, processors

G = 4
ONE_TURN = [name for name in recipes.names() if recipes.load(name).environment is None]


class Judge(BaseHTTPRequestHandler):
    """Rates by length, so that different replies get different scores."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        text = json.loads(body)["messages"][0]["content"]
        reply = f"0.{len(text) % 9 + 1} <info1>{len(text) % 2}</info1>"
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny policy and a tiny reward model on disk."""
    policy, reward = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reward")
    model = models.tiny_model("qwen2_5_vl")
    model.save_pretrained(policy)
    processors.tiny_processor(model.config).save_pretrained(policy)
    config = Qwen2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=models.VOCAB, num_labels=1,
    )  # fmt: skip
    tokenizer = processors.tiny_tokenizer(model.config)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(config).save_pretrained(reward)
    tokenizer.save_pretrained(reward)
    return policy, reward


@pytest.fixture
def environment(judge, folders, monkeypatch):
    monkeypatch.setenv("FASTGRPO_JUDGE_URL", judge)
    monkeypatch.setenv("FASTGRPO_REWARD_MODEL", str(folders[1]))


class Scripted(FastGRPOTrainer):
    """Rewards see the recipe's example completions; the tokens trained on are the sampled ones."""

    texts: tuple[str, ...] = ()

    def _generate(self, prompts):
        generated = list(super()._generate(prompts))
        said = [self.texts[i % len(self.texts)] for i in range(len(prompts))]
        generated[3] = [[{"role": "assistant", "content": text}] for text in said]
        return tuple(generated)


def rows(recipe, count=2):
    rng = np.random.RandomState(0)
    paired = {"pearl": [("is_perception", [True, False])], "co_reward": [("phrasing", [0, 1])]}
    data = []
    for i in range(count):
        row = {
            "prompt": [{"role": "user", "content": "find the 7"}],
            "image": Image.fromarray(rng.randint(0, 256, (400, 400, 3), dtype=np.uint8)),
            "problem": "find the 7",
            "answer_frame": "image",  # the examples answer in the pixels of their solutions
            **recipe.example["columns"],
        }
        row |= {k: v[i % len(v)] for k, v in paired.get(recipe.name, ())}
        data.append(row)
    return data


def short(reward):
    """The reward with a few tokens for what a second pass writes."""
    second = reward.get("second_pass")
    return reward | {"second_pass": second | {"max_new_tokens": 8}} if second else reward


def trainer_of(recipe, folder, tmp_path):
    keep = {
        k: v
        for k, v in recipe.config.items()
        if k in ("loss_type", "beta", "epsilon", "epsilon_high", "delta", "scale_rewards",
                 "use_bias_correction_kl", "shuffle_dataset", "entropy_coef")
    }  # fmt: skip
    settings = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=2 * G, num_generations=G,
        max_completion_length=5, max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False, bf16=False, learning_rate=1e-3, logging_steps=1,
        model_init_kwargs={"dtype": "float32"}, save_strategy="no", reward_weights=recipe.weights,
        lr_scheduler_type="constant", top_k=0,
    )  # fmt: skip
    from fastgrpo.integrations.trl.config import RenamedConfig

    trainer = Scripted(
        model=str(folder),
        reward_funcs=[build_reward(short(r), group_size=G) for r in recipe.rewards],
        args=RenamedConfig(**(settings | keep)),
        train_dataset=Dataset.from_list(rows(recipe)),
        rule=recipe.advantages,
        perception=recipe.perception,
    )
    example = recipe.example
    trainer.texts = (example["good"], example["bad"], example["good"], example["bad"] + " ")
    return trainer


@pytest.mark.parametrize("name", ONE_TURN)
def test_recipe_trains_three_steps(name, folders, environment, tmp_path):
    trainer = trainer_of(recipes.load(name), folders[0], tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert len(losses) == 3 and all(np.isfinite(losses))
    errors = {k: v for h in trainer.state.log_history for k, v in h.items() if "reward_errors" in k}
    assert errors and not any(errors.values())
    assert any(h.get("reward_std", 0) > 0 for h in trainer.state.log_history)
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_states_known_settings_and_prose(name):
    recipe = recipes.load(name)
    known = {f.name for f in fields(FastGRPOConfig)}
    assert set(recipe.config) <= known
    assert recipe.system and recipe.source
    assert len(recipe.exact) > 20 and len(recipe.reading) > 20
    assert {"columns", "good", "bad"} <= set(recipe.example)


@pytest.mark.parametrize(
    "name", [n for n in ONE_TURN if all("reward" in r for r in recipes.load(n).rewards)]
)
def test_rule_rewards_prefer_the_good_example(name):
    recipe = recipes.load(name)
    columns = {k: [v] for k, v in recipe.example["columns"].items()}
    totals = {}
    for side in ("good", "bad"):
        completion = [[{"role": "assistant", "content": recipe.example[side]}]]
        values = [
            build_reward(r, group_size=1)(prompts=[""], completions=completion, **columns)[0]
            for r in recipe.rewards
        ]
        totals[side] = sum(w * (v or 0.0) for w, v in zip(recipe.weights, values, strict=True))
    assert totals["good"] > totals["bad"]


def test_table_command_and_the_committed_page_agree(capsys):
    runpy.run_module("fastgrpo.recipes", run_name="__main__")
    printed = capsys.readouterr().out
    page = Path(__file__).parent.parent / "docs" / "recipes.md"
    assert printed == page.read_text("utf-8")
    assert all(f"`{name}`" in printed for name in recipes.names())


def test_train_command_takes_a_recipe(folders, tmp_path):
    from fastgrpo.cli.train import build_trainer, parse

    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (24, 16), "white").save(images / "a.png")
    data = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "4"}]
    lines = [json.dumps({"id": i, "image": "a.png", "conversations": turns}) for i in range(4)]
    data.write_text("\n".join(lines))
    config = tmp_path / "x.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "recipe": "papo",
                "model_name_or_path": str(folders[0]),
                "data_file_paths": str(data),
                "image_folders": str(images),
                "output_dir": str(tmp_path / "out"),
                "per_device_train_batch_size": 5,
                "report_to": "none",
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "beta": 0.02,
            }
        )
    )
    trainer = build_trainer(*parse(["--config", str(config), "--epsilon_high", "0.4"]))
    assert isinstance(trainer, FastGRPOTrainer)
    assert trainer.perception.kl_coef(0, 1) == 0.02 and trainer.args.num_generations == 5
    assert trainer.beta == 0.02 and trainer.epsilon_high == 0.4  # the user's words win
    assert trainer.reward_weights.tolist() == pytest.approx([0.9, 0.1])


def test_unknown_recipes_and_malformed_files_are_refused():
    with pytest.raises(InputError, match="no 'papa'"):
        recipes.load("papa")
    with pytest.raises(InputError, match="missing fields"):
        recipes.parse("x", {"system": "x"})
    with pytest.raises(InputError, match="mapping"):
        recipes.parse("x", [])
    base = dict(system="x", source="x", exact="x", reading="x", config={}, example={})
    with pytest.raises(InputError, match="at least one"):
        recipes.parse("x", base | {"rewards": []})
    with pytest.raises(InputError, match="expected one of"):
        recipes.parse("x", base | {"rewards": [{"reward": "a"}], "advantages": {"baseline": "x"}})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"weight": 1}, "exactly one"),
        ({"reward": "vlm_r1/iou", "model": "x"}, "exactly one"),
        ({"compose": "sum"}, "unknown kind"),
        ({"model": None}, "FASTGRPO_REWARD_MODEL"),
        ({"judge": {"prompt": "x"}}, "FASTGRPO_JUDGE_URL"),
        ({"reward": "no/such"}, "no reward"),
    ],
)
def test_bad_reward_specifications_are_refused(spec, message, monkeypatch):
    monkeypatch.delenv("FASTGRPO_JUDGE_URL", raising=False)
    monkeypatch.delenv("FASTGRPO_REWARD_MODEL", raising=False)
    with pytest.raises(InputError, match=message):
        build_reward(spec, group_size=2)


def test_templates_are_filled_once_and_leave_other_braces():
    assert _fill("{a} {b} \\boxed{} {c", {"a": "{b}", "b": 2}) == "{b} 2 \\boxed{} {c"
