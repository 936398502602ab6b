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
from fastgrpo.cli.train import load_processor, parse  # noqa: E402
from fastgrpo.testing.processors import tiny_processor  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402

# The flags of the scripts in run_scripts, the shell's variables in braces; ovd is the first of them
# with the rewards of VLM-R1's OVD recipe.
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
PLAIN = "--data_seed 42 --reward_funcs accuracy format --beta 0.04 "
LORA = """
--learning_rate 1e-5 --use_peft true --lora_r 64 --lora_alpha 128 --lora_dropout 0.05
--lora_task_type CAUSAL_LM --freeze_vision_modules true
"""
LINES = {
    "rec": REC + PLAIN,
    "lora": REC + PLAIN + LORA,
    "more params": REC + PLAIN + "--epsilon_high 0.28",
    "internvl": REC + PLAIN + "--max_anyres_num 6",
    "multi-image gui": HEAD
    + "--is_reward_customized_from_vlm_module False --reward_method all_match --task_type gui"
    + COMMON
    + "--max_steps 2 --reward_funcs accuracy format --beta 0.04",
    "gui defect": HEAD
    + "--is_reward_customized_from_vlm_module False --task_type gui_defect"
    + COMMON
    + PLAIN,
    "ovd": HEAD
    + "--is_reward_customized_from_vlm_module False --reward_method odLength --task_type odLength"
    + COMMON
    + "--reward_funcs accuracy format length repetition --beta 0.0",
}
# The scripts of src/open-r1-multimodal/run_scripts; the one for several nodes turns a YAML into
# its arguments.
OLDER = """
--deepspeed local_scripts/zero3.json --output_dir {out} --model_name_or_path {model}
--max_prompt_length 1024 --per_device_train_batch_size {batch} --logging_steps 1 --bf16
--report_to wandb --attn_implementation flash_attention_2 --run_name {name} --save_steps 100
"""
EPOCHS = "--torch_dtype bfloat16 --data_seed 42 --num_train_epochs 2 "
GROUP = "--num_generations 8 --gradient_accumulation_steps 2 --save_only_model true "
LISTED = OLDER + EPOCHS + "--dataset_name {repo}/{data}.yaml --image_root {images} "
LINES |= {
    "grpo_rec": LISTED + GROUP + "--gradient_checkpointing false",
    "grpo_rec lora": LISTED + GROUP + "--gradient_checkpointing true" + LORA,
    "grpo_rec more params": LISTED
    + "--num_generations 2 --gradient_accumulation_steps 4 --gradient_checkpointing false "
    + "--beta 0.0 --epsilon_high 0.28",
    "grpo_rec internvl": LISTED
    + GROUP
    + "--freeze_vision_modules true --max_anyres_num 6 --gradient_checkpointing true",
    "older gui": OLDER
    + EPOCHS
    + GROUP
    + "--dataset_name none --image_folders {images} --data_file_paths {data} "
    + "--freeze_vision_modules true --gradient_checkpointing true",
    "several nodes": OLDER
    + GROUP
    + "--dataset_name Idefics-ai2d --data_file_paths {data} --image_folders {images} "
    + "--max_pixels 401408 --max_steps 2 --save_total_limit 3",
}
# What is not the same in every script; 2 rows, or 4 for the line whose steps take 4 prompts.
BATCH = {"multi-image gui": 2, "grpo_rec internvl": 8, "older gui": 8}
BATCH |= dict.fromkeys(("grpo_rec", "grpo_rec lora", "grpo_rec more params", "several nodes"), 1)
DATA = {"multi-image gui": "two.jsonl", "older gui": "two.jsonl", "ovd": "ovd.jsonl"}
DATA |= {"gui defect": "defects.json", "grpo_rec more params": "four", "several nodes": "one.jsonl"}
DATA |= dict.fromkeys(("grpo_rec", "grpo_rec lora", "grpo_rec internvl"), "rec")
BY_ANSWER = ("multi-image gui", "gui defect", "ovd", "older gui", "several nodes")
DETECTED = '```json\n[{"bbox_2d": [1, 2, 9, 9], "label": "cat"}]\n```'
ROWS = {
    "one.jsonl": (1, "[1, 2, 9, 9]"),
    "two.jsonl": (2, "a"),
    "ovd.jsonl": (1, DETECTED),
    "defects.json": (2, "yes"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm-r1")
    for name, family in (("Qwen2.5-VL-tiny", "qwen2_5_vl"), ("InternVL2_5-tiny", "internvl")):
        (folder / name).mkdir()
        save_checkpoint(folder / name, family)
    for i in range(4):
        Image.radial_gradient("L").resize((16 + 8 * (i % 2), 24)).save(folder / f"{i}.png")
    for name, (count, answer) in ROWS.items():
        # run_grpo_gui_defect_detection.sh names no image folder, so that its images are paths.
        names = [str(folder / f"{i}.png") if name == "defects.json" else f"{i}.png" for i in (0, 1)]
        rows = [
            {
                "id": i,
                "image": names[i] if count == 1 else [names[i], names[1 - i]],
                "conversations": [
                    {"from": "human", "value": "<image>" * count + f"find {i}"},
                    {"from": "gpt", "value": answer},
                ],
            }
            for i in range(2)
        ]
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    rows = [
        {"image": f"{i}.png", "problem": f"find {i}", "solution": [1, 2, 9, 9]}
        for i in (2, 3, 0, 1)
    ]
    for name, count in (("rec", 2), ("four", 4)):
        (folder / f"{name}.json").write_text(json.dumps(rows[:count]))
        listed = f"datasets:\n    - json_path: {folder / name}.json\n"
        (folder / f"{name}.yaml").write_text(listed)
    return folder


def arguments(place, line, out):
    data = DATA.get(line, "one.jsonl")
    text = LINES[line].format(
        out=out,
        model=place / ("InternVL2_5-tiny" if "internvl" in line else "Qwen2.5-VL-tiny"),
        data=place / data if "." in data else data,
        images="" if line == "gui defect" else place,
        name=line.split()[0],
        repo=place,
        batch=BATCH.get(line, 8),
    )
    return text.split()


@pytest.fixture
def internvl(monkeypatch):
    """InternVL's own processor loads only with torchvision, for its videos."""
    from transformers import AutoConfig, AutoProcessor

    load = AutoProcessor.from_pretrained

    def loaded(name, **options):
        if "InternVL" not in str(name):
            return load(name, **options)
        return tiny_processor(AutoConfig.from_pretrained(name))

    monkeypatch.setattr(AutoProcessor, "from_pretrained", loaded)


@pytest.mark.parametrize("line", ["lora", "internvl", "multi-image gui", "grpo_rec"])
def test_a_published_command_line_trains_when_cut_short(place, tmp_path, internvl, line):
    check_run(place, tmp_path, line, "--max_completion_length", "16")


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_published_command_line_trains(place, tmp_path, internvl, line):
    check_run(place, tmp_path, line)


def check_run(place, tmp_path, line, *extra):
    main(["train", *arguments(place, line, tmp_path / "run"), *extra])
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 2  # each row in two of them
    rewards = {key for key in steps[0] if key.startswith("rewards/") and key.endswith("/mean")}
    model = "_internvl" if "internvl" in line else ""
    first = "vlm_r1_accuracy" if line in BY_ANSWER else f"vlm_r1_iou{model}"
    assert f"rewards/{first}/mean" in rewards
    assert len(rewards) == (4 if line == "ovd" else 2)
    assert (tmp_path / "run" / "quarantine.jsonl").read_text() == ""


def test_internvl_is_asked_in_its_own_words_with_at_most_so_many_tiles(
    place, tmp_path, internvl, caplog
):
    (config, model), notes = said(caplog, place, tmp_path, line="internvl")
    assert config.reward_funcs == ["vlm_r1/iou_internvl", "vlm_r1/format_rec_internvl"]
    assert config.task_type == "default" and config.max_tiles == 6
    assert any(note.startswith("max_anyres_num: is max_tiles") for note in notes)
    counts = []
    for config.max_tiles in (6, 2, 1):
        processor = load_processor(config, model)
        wide = Image.new("RGB", (96, 16))
        counts.append(len(processor.image_processor(wide, return_tensors="pt")["pixel_values"]))
    assert counts == [7, 3, 1]  # and a thumbnail, which a single tile is itself
    config.max_tiles = 0
    with pytest.raises(InputError, match="max_tiles: expected at least .* 1, got 0"):
        load_processor(config, model)


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
        ("--overwrite_output_dir", "overwrite_output_dir: today's transformers and TRL have"),
        ("--warmup_ratio 0.1 --warmup_steps 5", "warmup_ratio: warmup_steps is given too"),
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
        "warmup_ratio": "0.05", "evaluation_strategy": "no", "save_safetensors": "true",
        "sync_ref_model": "false", "ref_model_mixup_alpha": "0.9", "ref_model_sync_steps": "64",
        "log_completions": "true", "freeze_vision_modules": "false", "remove_unused_columns":
        "false",
    }  # fmt: skip
    extra = [text for name, value in flags.items() for text in (f"--{name}", *value.split())]
    config, _ = parse([*arguments(place, "rec", tmp_path / "run"), *extra])
    assert (config.max_pixels, config.epsilon_high) == (12845056, 0.28)
    assert config.reward_weights == [1.0, 1.0] and config.warmup_steps == 0.05


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
