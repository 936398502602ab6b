# SPDX-License-Identifier: Apache-2.0
"""VLM-R1's published command lines, unchanged after the program name, on small data."""

import json
import logging

import pytest
from PIL import Image

pytest.importorskip("trl")

from fastgrpo import InputError  # noqa: E402
from fastgrpo.cli import main  # noqa: E402
from fastgrpo.cli.data import load_data  # noqa: E402
from fastgrpo.cli.train import parse  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402

# The flags of run_scripts/run_grpo_rec.sh, ..._lora.sh, ..._more_params.sh and run_grpo_gui.sh, the
# shell's variables in braces; detection is the first with the rewards of VLM-R1's OVD recipe.
COMMON = """
--per_device_train_batch_size {batch} --gradient_accumulation_steps 2 --gradient_checkpointing true
--logging_steps 1 --num_train_epochs 2 --bf16 --attn_implementation flash_attention_2
--run_name {name} --save_steps 100 --num_generations 8 --max_completion_length 2048
--report_to wandb --dataset-name this_is_not_used --deepspeed {repo}/local_scripts/zero3.json
"""
HEAD = """
--use_vllm False --output_dir {out} --resume_from_checkpoint True --model_name_or_path {model}
--data_file_paths {data} --image_folders {images}
"""
REC = HEAD + "--is_reward_customized_from_vlm_module True --task_type rec" + COMMON
LINES = {
    "rec": REC + "--data_seed 42 --reward_funcs accuracy format --beta 0.04",
    "lora": REC + "--data_seed 42 --reward_funcs accuracy format --beta 0.04 --learning_rate 1e-5 "
    "--use_peft true --lora_r 64 --lora_alpha 128 --lora_dropout 0.05 "
    "--lora_task_type CAUSAL_LM --freeze_vision_modules true",
    "more params": REC
    + "--data_seed 42 --reward_funcs accuracy format --beta 0.04 --epsilon_high 0.28",
    "multi-image gui": HEAD
    + "--is_reward_customized_from_vlm_module False --reward_method all_match --task_type gui"
    + COMMON
    + "--max_steps 2 --reward_funcs accuracy format --beta 0.04",
    "ovd": HEAD
    + "--is_reward_customized_from_vlm_module False --reward_method odLength --task_type odLength"
    + COMMON
    + "--reward_funcs accuracy format length repetition --beta 0.0",
}
# run_grpo_rec.sh and run_grpo_rec_lora.sh of src/open-r1-multimodal/run_scripts, for grpo_rec.py.
LINES["grpo_rec"] = """
--deepspeed local_scripts/zero3.json --output_dir {out} --model_name_or_path {model}
--dataset_name {repo}/rec.yaml --image_root {images} --max_prompt_length 1024 --num_generations 8
--per_device_train_batch_size 1 --gradient_accumulation_steps 2 --logging_steps 1 --bf16
--torch_dtype bfloat16 --data_seed 42 --report_to wandb --gradient_checkpointing false
--attn_implementation flash_attention_2 --num_train_epochs 2 --run_name {name} --save_steps 100
--save_only_model true
"""
LINES["grpo_rec lora"] = LINES["grpo_rec"] + (
    "--learning_rate 1e-5 --use_peft true --lora_r 64 --lora_alpha 128 --lora_dropout 0.05 "
    "--lora_task_type CAUSAL_LM --freeze_vision_modules true"
)
BATCH = {"multi-image gui": 2}
DETECTED = '```json\n[{"bbox_2d": [1, 2, 9, 9], "label": "cat"}]\n```'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm-r1")
    (folder / "Qwen2.5-VL-tiny").mkdir()
    save_checkpoint(folder / "Qwen2.5-VL-tiny")
    for i in range(4):
        Image.radial_gradient("L").resize((16 + 8 * (i % 2), 24)).save(folder / f"{i}.png")
    for name, count, answer in (("one", 1, "[1, 2, 9, 9]"), ("two", 2, "a"), ("ovd", 1, DETECTED)):
        rows = [
            {
                "id": i,
                "image": f"{i}.png" if count == 1 else [f"{i}.png", f"{(i + 1) % 4}.png"],
                "conversations": [
                    {"from": "human", "value": "<image>" * count + f"find {i}"},
                    {"from": "gpt", "value": answer},
                ],
            }
            for i in range(2)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"image": f"{i}.png", "problem": f"find {i}", "solution": [1, 2, 9, 9]} for i in (2, 3)]
    (folder / "rec.json").write_text(json.dumps(rows))
    (folder / "rec.yaml").write_text(f"datasets:\n    - json_path: {folder / 'rec.json'}\n")
    return folder


def arguments(place, line, out):
    data = {"multi-image gui": "two", "ovd": "ovd"}.get(line, "one")
    text = LINES[line].format(
        out=out,
        model=place / "Qwen2.5-VL-tiny",
        data=place / f"{data}.jsonl",
        images=place,
        name=line.split()[0],
        repo=place,
        batch=BATCH.get(line, 8),
    )
    return text.split()


@pytest.mark.parametrize("line", ["lora", "multi-image gui", "grpo_rec"])
def test_a_published_command_line_trains_when_cut_short(place, tmp_path, line):
    check_run(place, tmp_path, line, "--max_completion_length", "16")


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_published_command_line_trains(place, tmp_path, line):
    check_run(place, tmp_path, line)


def check_run(place, tmp_path, line, *extra):
    main(["train", *arguments(place, line, tmp_path / "run"), *extra])
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 2  # two rows, two prompts a step, two epochs
    rewards = {key for key in steps[0] if key.startswith("rewards/") and key.endswith("/mean")}
    first = "vlm_r1_accuracy" if line in ("multi-image gui", "ovd") else "vlm_r1_iou"
    assert f"rewards/{first}/mean" in rewards
    assert len(rewards) == (4 if line == "ovd" else 2)
    assert (tmp_path / "run" / "quarantine.jsonl").read_text() == ""


def said(caplog, place, tmp_path, *extra, line="rec"):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        settings = parse([*arguments(place, line, tmp_path / "run"), *extra])
    return settings, [record.message for record in caplog.records]


def test_what_each_flag_becomes(place, tmp_path, caplog):
    (config, model), notes = said(caplog, place, tmp_path, line="lora")
    assert config.reward_funcs == ["vlm_r1/iou", "vlm_r1/format_rec"]
    assert (config.task_type, config.beta, config.data_seed) == ("rec", 0.04, 42)
    assert config.freeze_vision and config.resume and config.resume_from_checkpoint is None
    assert config.dataset_name is None and config.deepspeed is None
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64, 128, 0.0)
    assert not config.bf16 and config.report_to in ([], "none", ["none"])
    for name in ("dataset_name", "reward_funcs", "freeze_vision_modules", "lora_dropout", "bf16"):
        assert sum(note.startswith(f"{name}: ") for note in notes) == 1, name


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--temperature 0.9", "temperature: ignored by VLM-R1, obeyed here"),
        ("--top_k 50", "top_k: ignored by VLM-R1, obeyed here"),
        ("--max_prompt_length 1024", "max_prompt_length: ignored by VLM-R1"),
        ("--vllm_device auto", "vllm_device: ignored by VLM-R1, and there is nothing"),
        ("--arrow_cache_dir x", "arrow_cache_dir: ignored by VLM-R1"),
        ("--max_anyres_num 6", "max_anyres_num: tiles of InternVL only"),
        ("--torch_dtype bfloat16", "torch_dtype: is dtype here"),
        ("--log_completions true", "log_completions: ignored by VLM-R1, obeyed here"),
    ],
)
def test_flags_vlm_r1_ignores_are_answered(place, tmp_path, caplog, flags, note):
    _, notes = said(caplog, place, tmp_path, *flags.split())
    assert any(text.startswith(note) for text in notes), notes


def test_every_setting_of_vlm_r1_is_taken_or_answered(place, tmp_path):
    """Its GRPOScriptArguments, GRPOConfig's own fields and GRPOModelConfig's."""
    flags = {
        "arrow_cache_dir": "x", "val_split_ratio": "0.0", "max_pixels": "12845056",
        "min_pixels": "3136", "max_anyres_num": "12", "max_prompt_length": "512",
        "ds3_gather_for_generation": "true", "temperature": "0.9", "top_p": "1.0", "top_k": "50",
        "min_p": "0.1", "repetition_penalty": "1.0", "cache_implementation": "static",
        "use_vllm": "false", "vllm_device": "auto", "vllm_gpu_memory_utilization": "0.9",
        "vllm_dtype": "auto", "vllm_max_model_len": "512", "vllm_enable_prefix_caching": "true",
        "vllm_guided_decoding_regex": "x", "learning_rate": "1e-6", "num_iterations": "1",
        "epsilon": "0.2", "epsilon_high": "0.28", "reward_weights": "1.0 1.0",
        "sync_ref_model": "false", "ref_model_mixup_alpha": "0.9", "ref_model_sync_steps": "64",
        "log_completions": "true", "freeze_vision_modules": "false", "remove_unused_columns":
        "false",
    }  # fmt: skip
    extra = [text for name, value in flags.items() for text in (f"--{name}", *value.split())]
    config, _ = parse([*arguments(place, "rec", tmp_path / "run"), *extra])
    assert (config.max_pixels, config.epsilon_high) == (12845056, 0.28)
    assert config.reward_weights == [1.0, 1.0]


def test_rewards_it_has_not_are_refused(place, tmp_path):
    line = arguments(place, "rec", tmp_path / "run")
    for changed, message in (
        (["--reward_funcs", "accuracy", "length"], "reward_funcs: 'length' is none of"),
        (["--task_type", "gui"], "task_type: .* rec only, got 'gui'"),
        (["--is_reward_customized_from_vlm_module", "perhaps"], "expected true or false"),
    ):
        with pytest.raises(InputError, match=message):
            parse([*line, *changed])


def test_a_list_of_files_is_read_with_its_shares(place, tmp_path, caplog):
    entries = [
        {"json_path": str(place / "rec.json"), "sampling_strategy": "first:1"},
        {"json_path": str(place / "one.jsonl")},
    ]
    (tmp_path / "list.yaml").write_text(json.dumps({"datasets": entries}))
    (config, _), notes = said(
        caplog, place, tmp_path, "--dataset_name", str(tmp_path / "list.yaml"), line="grpo_rec"
    )
    assert config.data_file_paths == f"{place / 'rec.json'}:{place / 'one.jsonl'}"
    assert config.image_folders == f"{place}:{place}"
    assert config.data_sampling == ["first:1", "all"]
    assert config.reward_funcs == ["vlm_r1/iou", "vlm_r1/format_rec"]
    assert config.gradient_accumulation_steps == 16  # 8 completions are one group
    assert (
        sum(note.startswith("gradient_accumulation_steps: 16 in place of 2") for note in notes) == 1
    )
    train, _ = load_data(config)
    assert [row["problem"] for row in train] == ["find 2", "find 0", "find 1"]
    assert train[0]["solution"] == "<answer> [1,2,9,9] </answer>" and len(train[0]["images"]) == 1
    (tmp_path / "list.yaml").write_text("datasets: 3")
    with pytest.raises(InputError, match="dataset_name: .* must hold `datasets`"):
        said(
            caplog, place, tmp_path, "--dataset_name", str(tmp_path / "list.yaml"), line="grpo_rec"
        )


def test_defaults_are_its_own_when_its_flags_are_used(place, tmp_path, caplog):
    line = (
        f"--output_dir {tmp_path} --model_name_or_path {place / 'Qwen2.5-VL-tiny'} "
        f"--dataset_name none --data_file_paths {place / 'two.jsonl'} "
        "--freeze_vision_modules true --save_only_model true"
    )
    with caplog.at_level(logging.WARNING):
        config, _ = parse(line.split())
    assert (config.beta, config.task_type, config.max_completion_length) == (0.04, "default", 256)
    assert config.reward_funcs == ["vlm_r1/accuracy", "vlm_r1/format"]
    assert any(r.message.startswith("image_folders: not given") for r in caplog.records)
