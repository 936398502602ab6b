# SPDX-License-Identifier: Apache-2.0
"""Rows of several turns: tools, what an environment remembers, returns over turns, training."""

import inspect
import json
import math
import string
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.utils import get_json_schema

from fastgrpo import InputError, environments, recipes, rewards
from fastgrpo.environments import Step, ToolFault
from fastgrpo.environments.tools.calculator import calculate
from fastgrpo.environments.tools.index import Index
from fastgrpo.environments.tools.region import cut
from fastgrpo.rewards.systems.agent0_vl import step_rewards

SYSTEMS = {"vrag_rl", "arm_thinker", "agent0_vl", "vacot"}
PAGES = [
    {"id": "a", "text": "two cats sit and two dogs lie"},
    {"id": "b", "text": "a dog"},
    {"id": "c", "text": "nothing of it"},
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4", 14), ("(2 + 3) * 4", 20), ("2 ^ 3 ^ 2", 512), ("-2 ** 2", -4), ("7 // 2", 3),
        ("7 % 4", 3), ("1e3 / .5", 2000), ("sqrt(16) + max(1, 2, 3)", 7), ("6 ÷ 3 × 2", 4),
        ("2 * -3", -6), ("pi", math.pi), ("round(2.6)", 3), ("log(e)", 1),
    ],
)  # fmt: skip
def test_the_calculator_computes(text, value):
    assert calculate(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "2 +", "(1", "1)", "1 / 0", "9 ^ 9 ^ 9", "x", "__import__('os')", "sqrt(-1)", "(-8)^.5",
        "sqrt", "max(1", "1 2", "9" * 600, "(" * 60 + "1" + ")" * 60, "2^" * 200 + "1", "exp(1e9)",
        "min(1, 2)(3)", None, 3, "log(0)", "round(1, 2, 3)", "a.b", "1e999",
    ],
)  # fmt: skip
def test_the_calculator_refuses_what_is_no_arithmetic(text):
    with pytest.raises(ValueError, match="expression"):
        calculate(text)


def test_search_ranks_by_bm25():
    index = Index.of_rows(PAGES)
    assert [d.id for d in index.search("dogs", 3)] == ["a"]
    assert [d.id for d in index.search("a dog", 3)] == ["b"]
    assert index.search("", 3) == [] == index.search("elephant", 3)
    # By hand: 3 documents of 7, 2 and 3 words (mean 4); "two" stands twice in the first.
    rare, long = math.log(1 + 2.5 / 1.5), 1.5 * (1 - 0.75 + 0.75 * 7 / 4)
    score = rare * 2 * 2.5 / (2 + long)
    other = math.log(1 + 2.5 / 1.5) * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / 4))
    assert score < other  # a short page with the word once beats a long one with it twice
    assert [d.id for d in index.search("two dog", 3)] == ["b", "a"]
    with pytest.raises(InputError, match="document 1 has no 'id'"):
        Index.of_rows([PAGES[0], {"text": "x"}])


def test_an_index_on_disk_finds_pictures_beside_itself(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    (tmp_path / "pages.jsonl").write_text(
        json.dumps({"id": "p", "text": "cat", "image": "p.png"}) + "\n"
    )
    environment = environments.get("vrag_rl", index=str(tmp_path / "pages.jsonl"))()
    environment.reset(images=[Image.new("RGB", (8, 8))])
    shown, text = environment.search("cat")
    assert shown["image"].size == (4, 4) and text["text"] == "Page p. It is image 2."
    assert environment.retrieved == ["p"]
    with pytest.raises(InputError, match="not a file of JSON lines"):
        environments.get("vrag_rl", index=str(tmp_path / "none"))()
    with pytest.raises(InputError, match="no index is set"):
        environments.get("vrag_rl")().reset()


def test_a_cut_is_the_box_in_thousandths_enlarged():
    pixels = np.arange(40 * 80 * 3, dtype=np.uint32).reshape(40, 80, 3) % 251
    image = Image.fromarray(pixels.astype(np.uint8))
    part = cut(image, [250, 500, 500, 1000])  # x 20 to 40, y 20 to 40
    assert part.size == (160, 160)  # eight times at most
    small = part.resize((20, 20), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, int) - pixels[20:40, 20:40]).mean() < 25
    large = Image.fromarray(np.tile(pixels, (20, 10, 1)).astype(np.uint8))  # 800 x 800
    exact = cut(large, [100, 200, 900, 800])  # 640 x 480, not enlarged
    assert (np.asarray(exact) == np.asarray(large)[160:640, 80:720]).all()
    for box in ([500, 0, 250, 9], [0, 0, 1, 1], "box", [0, 0, 1], [1, 2, 3, float("nan")], None):
        with pytest.raises(ValueError, match="box"):
            cut(image, box)


def test_environments_are_found_and_describe_their_tools():
    assert set(environments.names()) == SYSTEMS
    with pytest.raises(InputError, match="no 'vrag'"):
        environments.get("vrag")
    with pytest.raises(InputError, match="no setting 'turns'"):
        environments.get("vacot", turns=3)
    for name in SYSTEMS:
        kind = environments.get(name).func
        members = inspect.getmembers(kind, inspect.isfunction)  # as TRL finds them
        tools = [member for member, _ in members if member[0] != "_" and member != "reset"]
        assert "zoom" in tools
        for tool in tools:
            schema = get_json_schema(getattr(kind(), tool))["function"]
            assert schema["name"] == tool and schema["parameters"]["required"]


def test_calls_are_recorded_and_bounded():
    environment = environments.get("vacot", max_calls=3)()
    environment.reset(image=Image.new("RGB", (8, 4)))
    picture, said = environment.rotate(90, 1)
    assert picture["image"].size == (4, 8) and "It is image 2" in said["text"]
    with pytest.raises(ToolFault, match="there are images 1 to 2"):
        environment.zoom([0, 0, 1000, 1000], 3)
    with pytest.raises(ToolFault, match="unexpected keyword"):
        environment.rotate(turn=3, image=1)
    with pytest.raises(ToolFault, match="3 are allowed"):
        environment.rotate(90, 1)
    assert [(step.tool, step.ok) for step in environment.steps] == [
        ("rotate", True), ("zoom", False), ("rotate", False),
    ]  # fmt: skip
    environment.reset(images=[Image.new("RGB", (8, 4)), "no/such/file.png"])
    assert environment.steps == [] and len(environment.images) == 2
    with pytest.raises(ToolFault, match="image 2 cannot be read"):
        environment.denoise(2)


def rollout(*steps, **state):
    return SimpleNamespace(steps=[Step(*step) for step in steps], **state)


def paid(name, text, environment, **columns):
    given = {key: [value] for key, value in columns.items()} | {"environments": [environment]}
    completion = [{"role": "assistant", "content": "earlier"}, {"role": "tool", "content": "x"},
                  {"role": "assistant", "content": text}]  # fmt: skip
    (value,) = rewards.get(name)(None, [completion], **given)
    return value


def test_agent0_returns_by_hand():
    sure, unsure = ("verify", True, (0.5, 0.9)), ("verify", True, (0.5, 0.2))
    call, failed = ("calculator", True, 4.0), ("zoom", False)
    constants = (0.3, 0.05, 5.0, 0.7)
    assert step_rewards([Step(*call), Step(*sure)], *constants) == [pytest.approx(0.3 + 0.45)]
    # A doubted step is repaired: the gate of confidence 0.2 is sigmoid(5 * 0.5).
    steps = [Step(*s) for s in (call, unsure, failed, sure)]
    gate = 1 / (1 + math.exp(-2.5))
    by_hand = [0.3 + 0.1, 0.0 - 0.05 * gate + 0.45]
    assert step_rewards(steps, *constants) == pytest.approx(by_hand)
    total = 1 + by_hand[0] + 0.99 * by_hand[1]
    environment = rollout(call, unsure, failed, sure)
    assert paid("agent0_vl/episode", "<answer>4</answer>", environment, solution="4") == (
        pytest.approx(total)
    )
    wrong = paid("agent0_vl/episode", "<answer>5</answer>", environment, solution="4")
    assert wrong == pytest.approx(total - 1)
    assert paid("agent0_vl/episode", "<answer>4</answer>", rollout(), solution="4") == 1


def test_a_verdict_needs_a_step_and_a_confidence():
    environment = environments.get("agent0_vl")()
    environment.reset()
    with pytest.raises(ToolFault, match="no new step"):
        environment.verify(1.0, 1.0)
    assert environment.calculator("2 + 2") == "4"
    with pytest.raises(ToolFault, match="confidence"):
        environment.verify(1.0, 2)
    with pytest.raises(
        ToolFault, match="no new step"
    ):  # the one before was a verdict, if a bad one
        environment.verify(1.0, 1.0)
    with pytest.raises(ToolFault, match="cannot read"):
        environment.calculator("__import__('os')")
    assert [step.ok for step in environment.steps] == [False, True, False, False, False]


def test_the_ladder_of_arm_thinker():
    right = "<think>t</think><answer>Answer 1 is better</answer>"
    none, tried, used = rollout(), rollout(("zoom", False)), rollout(("zoom", True))
    table = [
        ("no format", used, 0.0), (right.replace("1", "2"), none, 0.3),
        (right.replace("1", "2"), tried, 0.4), (right, none, 1.0), (right, tried, 1.0),
        (right, used, 1.5),
        # Words about tools are no use of one.
        (right.replace("t<", "<tool_response>This is the zoom-in image</tool_response><"), none, 1),
    ]  # fmt: skip
    for text, environment, value in table:
        assert paid("arm_thinker/episode", text, environment, solution=1) == value


def test_vrag_pays_what_was_retrieved():
    found = rollout(retrieved=["c", "a", "a"])
    columns = {"relevant": ["a", "b"], "solution": "Two"}
    ndcg = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    right = paid("vrag_rl/episode", "<answer>two</answer>", found, **columns)
    assert right == pytest.approx(0.7 + 0.1 + 0.2 * ndcg)
    wrong = paid("vrag_rl/episode", "<answer>one</answer>", found, **columns)
    assert wrong == pytest.approx(0.1 + 0.2 * ndcg)
    assert paid("vrag_rl/episode", "two", found, **columns) == 0


def test_vacot_pays_a_tool_that_was_needed():
    used, columns = rollout(("zoom", True)), {"solution": "4"}
    answer = "<answer>4</answer>"
    assert paid("vacot/episode", answer, used, tool_needed=True, **columns) == 1.5
    assert paid("vacot/episode", answer, used, tool_needed=False, **columns) == 1.0
    failed = rollout(("zoom", False))
    assert paid("vacot/episode", answer, failed, tool_needed=True, **columns) == 1.0
    wordy = answer + " word" * 767  # 768 words: half of the penalty
    assert paid("vacot/episode", wordy, used, tool_needed=True, **columns) == pytest.approx(1.25)


def test_thoughts_that_the_tokenizer_parsed_away_are_read():
    message = {"role": "assistant", "content": "<answer>4</answer>", "reasoning_content": "t"}
    assert rewards.get("vlm_r1/format")(None, [[message]]) == [1.0]
    assert rewards.get("vlm_r1/format")(None, [[message | {"reasoning_content": None}]]) == [0.0]


# As Qwen's: a line break after the role and after each message.
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{%- endfor -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@pytest.fixture
def policy(monkeypatch, tmp_path):
    """A tiny model on disk and a processor whose template and parser know tool calls."""
    from trl.chat_template_utils import qwen3_template

    from fastgrpo.testing import processors
    from fastgrpo.testing.models import tiny_model

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr(processors, "CHARACTERS", "\n" + string.printable[:95])
    model = tiny_model("qwen2_5_vl")
    processor = processors.tiny_processor(model.config)
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    processor.tokenizer.response_template = qwen3_template
    model.save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy"), processor


def script(recipe):
    """`_generate_single_turn` that makes the example's calls and answer in every other row."""
    calls = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in recipe.example["calls"]]
    said = [*calls, recipe.example["good"]]

    def generate(self, prompt_ids, *args, **kwargs):
        tokenizer = self.processing_class.tokenizer
        texts = []
        for i, ids in enumerate(prompt_ids):
            turn = tokenizer.decode(ids).count("</tool_call>")
            bad = turn == 0 and i % 2
            texts.append(recipe.example["bad"] if bad else said[turn])
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [row + [tokenizer.eos_token_id] for row in ids], None

    return generate


def trained(cls, recipe, policy, tmp_path, monkeypatch, *, image, **options):
    """Three steps of a recipe on the scripted rollouts: (trainer, the masks of each batch)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from fastgrpo.recipes.rewards import build_reward

    folder, processor = policy
    row = {"prompt": [{"role": "user", "content": "look"}], **recipe.example["columns"]}
    if image:
        row["images"] = [Image.radial_gradient("L").resize((32, 16)).convert("RGB")]
    config = {
        key: value for key, value in recipe.config.items() if key not in ("num_generations",)
    } | dict(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=3,
        max_completion_length=600, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        lr_scheduler_type="constant", model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = cls(
        folder,
        [build_reward(spec, group_size=4) for spec in recipe.rewards],
        GRPOConfig(**config),
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=processor,
        environment_factory=recipe.environment_factory,
        **options,
    )
    scored, batches = trainer._generate_and_score_completions, []
    trainer._generate_and_score_completions = lambda inputs: (
        batches.append(scored(inputs)) or batches[-1]
    )
    with monkeypatch.context() as patch:  # below what the fast trainer does with tool images
        patch.setattr(GRPOTrainer, "_generate_single_turn", script(recipe))
        trainer.train()
    return trainer, batches


@pytest.mark.parametrize(
    "name",
    ["vrag_rl", *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(SYSTEMS - {"vrag_rl"}))],
)
def test_each_system_trains_three_steps_as_trl_does(name, policy, tmp_path, monkeypatch):
    from trl import GRPOTrainer

    from fastgrpo.integrations.trl import FastGRPOTrainer
    from fastgrpo.testing.trl import steps_of

    recipe = recipes.load(f"{name}_turns")
    image = name in ("arm_thinker", "vacot")
    fast, batches = trained(
        FastGRPOTrainer, recipe, policy, tmp_path / "f", monkeypatch, image=image,
        fast={"packed_rollout": False, "keep_groups": False},
    )  # fmt: skip
    stock, _ = trained(GRPOTrainer, recipe, policy, tmp_path / "s", monkeypatch, image=image)
    got, want = steps_of(fast), steps_of(stock)
    assert len(got) == len(want) == 3
    for key in ("loss", "grad_norm", "reward", "reward_std", "tools/call_frequency", "kl"):
        if key in want[0]:
            mine, theirs = ([step[key] for step in steps] for steps in (got, want))
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5), key
    assert got[0]["tools/failure_frequency"] == 0 < got[0]["tools/call_frequency"]
    assert got[0]["reward_std"] > 0 and all(step["grad_norm"] > 0 for step in got)
    # What a tool returned is in the completion and not in the loss.
    tokenizer = fast.processing_class.tokenizer
    ids, mask = batches[0]["completion_ids"][0], batches[0]["tool_mask"][0].bool()
    whole = batches[0]["completion_mask"][0].bool()
    masked, kept = tokenizer.decode(ids[whole & ~mask]), tokenizer.decode(ids[whole & mask])
    assert "<|im_start|>tool" in masked and "<|im_start|>tool" not in kept
    assert recipe.example["good"] in kept


def test_tool_images_are_refused_where_only_packed_rows_will_do(policy, tmp_path, monkeypatch):
    """Of families whose completions hold no images; the others train, see test_trl_tool_images."""
    from fastgrpo import models
    from fastgrpo.integrations.trl import FastGRPOTrainer

    family = type(models.families()["qwen2_5_vl"])
    monkeypatch.setattr(family, "serves_images_in_completions", False)
    with pytest.raises(InputError, match="may return images inside a completion"):
        trained(
            FastGRPOTrainer, recipes.load("vacot_turns"), policy, tmp_path, monkeypatch,
            image=True, fast={"strict": True},
        )  # fmt: skip
