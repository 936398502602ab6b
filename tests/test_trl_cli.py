# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo train` from a config file to a checkpoint, and which checkpoint it resumes from."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("trl")

from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402

from fastgrpo import InputError  # noqa: E402
from fastgrpo.checkpoints import fault_of, newest_complete  # noqa: E402
from fastgrpo.cli import main  # noqa: E402
from fastgrpo.cli.config import FastGRPOConfig  # noqa: E402
from fastgrpo.cli.train import build_trainer, find_reward, load_processor, parse  # noqa: E402
from fastgrpo.integrations.trl import FastOptions  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A model whose generation_config is greedy, eight good rows and a broken one."""
    folder = tmp_path_factory.mktemp("job")
    save_checkpoint(folder / "model")
    GenerationConfig(
        do_sample=True, top_k=1, top_p=0.001, repetition_penalty=1.05, min_p=0.9, typical_p=0.2
    ).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    rows = []
    for i in range(8):
        Image.radial_gradient("L").resize((16 + 8 * (i % 2), 24)).save(folder / f"images/{i}.png")
        rows.append(row(i, f"{i}.png"))
    rows.insert(4, row("lost", "lost.png"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = dict(
        model_name_or_path=str(folder / "model"),
        data_file_paths=str(folder / "rows.jsonl"),
        image_folders=str(folder / "images"),
        question_template="{Question}",
        reward_funcs=["vlm_r1/iou", "reward_module:distinct"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=6,
        logging_steps=1,
        log_completions=True,
        num_completions_to_print=0,
        learning_rate=1.0e-3,
        disable_tqdm=True,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "reward_module.py").write_text(
        "def distinct(completions, **columns):\n"
        "    return [float(len(set(c[0]['content']))) for c in completions]\n"
        "constant = 3\n"
    )
    return folder


def row(index, image):
    turns = [{"value": f"<image>find {index}"}, {"value": "[1, 2, 9, 9]"}]
    return {"id": index, "image": image, "conversations": turns}


@pytest.fixture
def train(job, tmp_path, monkeypatch):
    monkeypatch.chdir(job)

    def run(*options):
        main(["train", "--config", "config.yaml", "--output_dir", str(tmp_path / "run"), *options])
        return tmp_path / "run"

    return run


def settings(job, *options):
    arguments = ["--config", str(job / "config.yaml"), "--output_dir", str(job / "out"), *options]
    return parse(arguments)


def test_a_whole_run_leaves_a_model_a_log_and_the_completions(train, job):
    run = train(
        *("--max_steps 2 --val_split_ratio 0.25 --eval_strategy steps".split()),
        *("--eval_steps 1 --per_device_eval_batch_size 4 --beta 0.01".split()),
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(run)
    start = Qwen2_5_VLForConditionalGeneration.from_pretrained(job / "model")
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert {"reward", "kl", "entropy", "rewards/distinct/mean", "rewards/vlm_r1_iou/mean"} <= set(
        steps[0]
    )
    assert len([entry for entry in history if "eval_reward" in entry]) == 2
    (aside,) = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert (aside["id"], aside["line"], aside["reason"]) == ("lost", 5, "missing")
    import pyarrow.parquet as parquet

    table = parquet.read_table(run / "completions" / "completions_00001.parquet").to_pylist()
    assert len(table) == 8 and {"completion", "advantage", "image_path"} <= set(table[0])
    assert len({entry["completion"][0]["content"] for entry in table[:4]}) > 1  # not greedy


def test_it_resumes_from_the_newest_complete_checkpoint(train, tmp_path, caplog):
    options = ["--save_strategy", "steps", "--save_steps", "1", "--lr_scheduler_type", "constant"]
    whole = train(*options, "--max_steps", "3")
    weights = (whole / "model.safetensors").read_bytes()
    shutil.rmtree(whole / "checkpoint-3")
    shutil.copytree(whole / "checkpoint-2", whole / "checkpoint-9")
    (whole / "checkpoint-9" / "trainer_state.json").unlink()  # killed while it was written
    run = train(*options, "--max_steps", "3")
    assert "checkpoint-9 is incomplete and skipped: trainer_state.json is missing" in caplog.text
    assert f"resuming from {run / 'checkpoint-2'}" in caplog.text
    assert (run / "model.safetensors").read_bytes() == weights
    with pytest.raises(SystemExit, match="checkpoint-9 is incomplete"):
        train(*options, "--resume_from_checkpoint", str(run / "checkpoint-9"))


def cut(name, keep):
    def damage(checkpoint):
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def remove(name):
    return lambda checkpoint: (checkpoint / name).unlink()


DAMAGE = {
    "trainer_state.json is missing": remove("trainer_state.json"),
    "trainer_state.json is cut short": cut("trainer_state.json", 0.5),
    "no weights": remove("model.safetensors"),
    "model.safetensors is cut short": cut("model.safetensors", 0.999),
    "model.safetensors is cut short header": cut("model.safetensors", 0.001),
    "model.safetensors is cut short empty": cut("model.safetensors", 0),
    "optimizer.pt is cut short": cut("optimizer.pt", 0.9),
    "scheduler.pt is cut short": cut("scheduler.pt", 0.5),
    "rng_state.pth is cut short": cut("rng_state.pth", 0.5),
}


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    config, model_config = settings(
        job,
        *("--max_steps 1 --save_strategy steps --save_steps 1 --reward_funcs vlm_r1/iou".split()),
    )
    config.output_dir = str(folder)
    build_trainer(config, model_config).train()
    (folder / "checkpoint-1" / "manifest.json").unlink()  # as transformers alone leaves it
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_incomplete_checkpoint_is_named_and_passed_over(finished, tmp_path, damage):
    for step in (1, 2):
        shutil.copytree(finished / "checkpoint-1", tmp_path / f"checkpoint-{step}")
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 2}))
    (tmp_path / "checkpoint-3-backup").mkdir()
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-2", [])
    DAMAGE[damage](tmp_path / "checkpoint-2")
    chosen, [(path, fault)] = newest_complete(tmp_path)
    assert chosen == tmp_path / "checkpoint-1" and path == tmp_path / "checkpoint-2"
    assert damage.startswith(fault)


def test_a_sharded_checkpoint_needs_every_shard(finished, tmp_path):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(finished / "checkpoint-1")
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(finished / "checkpoint-1", checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="50KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1 and fault_of(checkpoint) is None
    shards[0].unlink()
    assert fault_of(checkpoint) == f"{shards[0].name} is missing"


def test_no_checkpoint_at_all(tmp_path):
    assert newest_complete(tmp_path) == (None, [])
    assert newest_complete(tmp_path / "absent") == (None, [])


def test_rollouts_sample_the_plain_softmax_whatever_the_checkpoint_says(job, monkeypatch):
    monkeypatch.chdir(job)
    trainer = build_trainer(*settings(job, "--temperature", "0.9"))
    effective, _ = trainer.model._prepare_generation_config(trainer.generation_config)
    assert effective.do_sample and effective.temperature == 0.9
    assert (effective.top_k, effective.top_p, effective.repetition_penalty) == (0, 1.0, 1.0)
    assert (effective.min_p, effective.typical_p, effective.no_repeat_ngram_size) == (0.0, 1.0, 0)


def test_explicit_sampling_settings_are_kept(job):
    config, _ = settings(job, "--min_p", "0.05", "--generation_kwargs", '{"typical_p": 0.9}')
    assert config.generation_kwargs["min_p"] == 0.05
    assert config.generation_kwargs["typical_p"] == 0.9


def test_the_vision_tower_can_be_frozen_and_the_loss_be_one_trl_lacks(job, monkeypatch):
    monkeypatch.chdir(job)
    options = "--freeze_vision --max_steps 1 --loss_type gmpo".split()
    trainer = build_trainer(*settings(job, *options))
    before = [p.clone() for p in trainer.model.model.visual.parameters()]
    trainer.train()
    for p, old in zip(trainer.model.model.visual.parameters(), before, strict=True):
        assert torch.equal(p, old)
    assert trainer.state.log_history[0]["grad_norm"] > 0
    assert {"clip_ratio/low_mean", "entropy"} <= set(trainer.state.log_history[0])


def test_lora_from_the_command_line(job, monkeypatch):
    monkeypatch.chdir(job)
    config, model_config = settings(job, "--use_peft", "--lora_r", "4", "--max_steps", "1")
    assert model_config.lora_dropout == 0.0
    trainer = build_trainer(config, model_config)
    trainer.train()
    trained = {
        name.split(".")[-4] for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert {"q_proj", "down_proj"} <= trained and "lm_head" not in trained


def test_pixel_limits_reach_the_processor(job):
    processor = load_processor(*settings(job, "--min_pixels", "256", "--max_pixels", "1024"))
    large = processor.image_processor(Image.new("RGB", (400, 400)))["image_grid_thw"][0]
    small = processor.image_processor(Image.new("RGB", (8, 8)))["image_grid_thw"][0]
    patch = processor.image_processor.patch_size**2
    assert int(large.prod()) * patch <= 1024 and int(small.prod()) * patch >= 256


def test_rewards_are_found_by_name_or_by_module(job, monkeypatch):
    monkeypatch.chdir(job)
    assert find_reward("vlm_r1/iou", "upstream").compat == "upstream"
    assert find_reward("reward_module:distinct")([[{"content": "aab"}]]) == [2.0]
    for name, message in {
        "vlm_r1/none": "vlm_r1/none",
        "no_such_module:f": "cannot be imported",
        "reward_module:absent": "cannot be imported",
        "reward_module:constant": "not a function",
    }.items():
        with pytest.raises(InputError, match=message):
            find_reward(name)


@pytest.mark.parametrize("missing", ["data_file_paths", "model_name_or_path"])
def test_required_settings(job, tmp_path, missing):
    config = yaml.safe_load((job / "config.yaml").read_text())
    del config[missing]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=f"{missing} is required"):
        parse(["--config", str(tmp_path / "config.yaml")])


def test_every_option_of_the_trainer_is_a_setting_with_its_default():
    settings = {field.name: field.default for field in fields(FastGRPOConfig)}
    for option in fields(FastOptions):
        assert settings[option.name] == option.default, option.name


def test_an_unknown_setting_is_an_error(job, tmp_path):
    config = yaml.safe_load((job / "config.yaml").read_text()) | {"num_generation": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="num_generation"):
        parse(["--config", str(tmp_path / "config.yaml")])


def test_the_command_names_its_subcommands(capsys):
    main([])
    usage = capsys.readouterr().out
    assert all(name in usage for name in ("train", "doctor", "bench", "report"))
    with pytest.raises(SystemExit, match="unknown command 'trian'"):
        main(["trian"])


def test_input_errors_end_the_command_with_their_message(job):
    arguments = ["--config", str(job / "config.yaml"), "--data_file_paths", "/nowhere.jsonl"]
    with pytest.raises(SystemExit, match="fastgrpo train: data_file_paths: /nowhere.jsonl"):
        main(["train", *arguments])


def test_bench_runs_the_scripts_of_a_folder(tmp_path, capfd):
    (tmp_path / "bench_one.py").write_text("import sys; print('one', sys.argv[1:])")
    (tmp_path / "bench_two.py").write_text("print('two')")
    main(["bench", "--folder", str(tmp_path), "--list"])
    assert capfd.readouterr().out.split() == ["one", "two"]
    main(["bench", "one", "--folder", str(tmp_path), "--tiny"])
    output = capfd.readouterr().out
    assert "one ['--tiny']" in output and "two" not in output
    with pytest.raises(SystemExit, match="no benchmark 'three'; there are one, two"):
        main(["bench", "three", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="source checkout"):
        main(["bench", "--folder", str(tmp_path / "absent")])
