# SPDX-License-Identifier: Apache-2.0
"""The first five minutes: init, check, train and report, no setting touched."""

import json

import pytest
import yaml

pytest.importorskip("trl")

from fastgrpo.cli import main  # noqa: E402


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "job"
    main(["init", str(folder)])
    return folder


def check(capsys, *arguments):
    capsys.readouterr()
    code = 0
    try:
        main(["check", "--json", *arguments])
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(capsys.readouterr().out)


def texts(findings, part, state="ok"):
    return [f["text"] for f in findings if (f["part"], f["state"]) == (part, state)]


def test_what_init_writes_trains_as_it_is(started, capsys):
    config = str(started / "config.yaml")
    code, findings = check(capsys, "--config", config)
    assert code == 0 and all(f["state"] != "fault" for f in findings), findings
    assert not (started / "run").exists()  # a check writes nothing
    main(["train", "--config", config])
    printed = capsys.readouterr().out
    for command in (f"report {started}/run", f"eval {started}/run --config {config}"):
        assert f"fastgrpo {command}\n" in printed
    assert f"model: {(started / 'run').resolve()}\n" in printed
    history = json.loads((started / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert all(0 < entry["rewards/closeness/mean"] <= 1 for entry in steps)
    assert max(entry["reward_std"] for entry in steps) > 0
    main(["report", str(started / "run")])
    assert (started / "run" / "report" / "report.html").exists()
    main(["eval", "--config", config])
    (one,) = json.loads((started / "run" / "eval" / "eval.json").read_text())["checkpoints"]
    assert one["figures"]["rows"] == 2 and 0 <= one["figures"]["mean_iou"] <= 1
    assert (started / "run" / "eval" / "run" / "worst.html").exists()


def test_check_counts_by_hand(started, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text((started / "rows.jsonl").read_text() * 5)
    code, findings = check(
        capsys,
        *("--config", str(started / "config.yaml"), "--gradient_accumulation_steps", "3"),
        *("--per_device_train_batch_size", "4", "--data_file_paths", str(tmp_path / "rows.jsonl")),
    )
    assert code == 0
    step, sampled, run = texts(findings, "batch")
    assert step.startswith("4 completions a device x 1 process(es) x 3 accumulated = 12 compl")
    assert "12 completions, 3 prompts x 4, an optimizer step" in step
    assert sampled.startswith("12 completions of 3 prompts are sampled at once, for 3 micro-")
    assert (
        run == "9 of 10 rows make an epoch of 3 optimizer step(s); the run takes 4, 1.33 epoch(s)"
    )
    assert any(text.startswith("10 rows, 10 images, 1 a row") for text in texts(findings, "data"))
    # Two turn starts and roles, an end, image start and end, 4 x 4 patches, "find the 7" in 3.
    (tokens, images, longest) = texts(findings, "prompts")
    length = int(tokens.split()[0])
    assert length == 2 * 2 + 1 + 2 + 16 + 3
    assert longest == f"{length + 24} tokens at most with a completion of 24"
    assert images == f"images of {112 * 112} pixels, seen as {112 * 112}"
    (memory,) = texts(findings, "memory")
    assert "of " in memory and "weights" in memory


def test_the_memory_of_weights_and_optimizer_is_counted_from_the_config(started):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForImageTextToText

    from fastgrpo.cli.estimate import estimate
    from fastgrpo.cli.train import parse

    model = AutoModelForImageTextToText.from_pretrained(started / "model")
    count = sum(p.numel() for p in model.parameters())
    tower = sum(p.numel() for n, p in model.named_parameters() if "visual." in n)
    hf_config = AutoConfig.from_pretrained(started / "model")

    def parts(*options):
        settings = parse(["--config", str(started / "config.yaml"), *options])
        return estimate(*settings, hf_config, 26)

    whole = parts("--beta", "0.1")
    assert (whole.parameters, whole.trainable) == (count, count)
    assert whole.parts["weights"] == whole.parts["reference"] == 4 * count
    assert whole.parts["optimizer"] == 8 * count
    frozen = parts("--freeze_vision")
    assert frozen.trainable == count - tower and frozen.parts["reference"] == 0
    for targets in ("all-linear", "q_proj v_proj", r".*language_model.*\.q_proj"):
        adapted = parts("--use_peft", "--lora_r", "2", "--lora_target_modules", *targets.split())
        policy = AutoModelForImageTextToText.from_pretrained(started / "model")
        modules = targets.split() if " " in targets else targets
        peft = get_peft_model(policy, LoraConfig(r=2, target_modules=modules))
        assert adapted.trainable == peft.get_nb_trainable_parameters()[0]
    assert 0 < adapted.parts["activations"] < whole.available


def test_init_keeps_what_is_there_and_takes_the_users_model(tmp_path):
    main(["init", str(tmp_path / "a"), "--model", "Qwen/Qwen2.5-VL-3B-Instruct"])
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["model_name_or_path"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert not (tmp_path / "a" / "model").exists()
    for folder, message in ((tmp_path / "a", "not empty"), (tmp_path / "f", "is a file")):
        (tmp_path / "f").touch()
        with pytest.raises(SystemExit, match=message):
            main(["init", str(folder)])


FAULTS = {
    "rows.jsonl: no usable row": ["--image_folders", "{folder}"],
    "model_name_or_path: no processor": ["--model_name_or_path", "{folder}/images"],
    "num_generations": ["--num_generations", "5"],
    "there is no such setting; did you mean beta": ["--betta", "1"],
}


@pytest.mark.parametrize("message", FAULTS)
def test_check_says_what_would_stop_the_run(started, capsys, message):
    options = [text.format(folder=started) for text in FAULTS[message]]
    code, findings = check(capsys, "--config", str(started / "config.yaml"), *options)
    assert code == 1
    (fault,) = [f["text"] for f in findings if f["state"] == "fault"]
    assert message in fault and "\n" not in fault


def test_check_shows_the_first_faults_of_the_data(started, tmp_path, capsys):
    rows = (started / "rows.jsonl").read_text() + "{}\n" * 5
    (tmp_path / "rows.jsonl").write_text(rows)
    code, findings = check(
        capsys,
        *("--config", str(started / "config.yaml")),
        *("--data_file_paths", str(tmp_path / "rows.jsonl")),
    )
    assert code == 0
    notes = texts(findings, "data", "note")
    assert len(notes) == 4 and "rows.jsonl:3 set aside, conversations" in notes[0]
    assert notes[-1] == "5 rows set aside in all"


def test_a_reward_that_misses_its_column_is_a_fault(started, tmp_path, capsys):
    (tmp_path / "rows.json").write_text('[{"prompt": "find the 7"}, {"prompt": "find the 3"}]')
    (tmp_path / "config.yaml").write_text(
        f"model_name_or_path: {started}/model\ndataset_name: {tmp_path}/rows.json\n"
    )
    code, findings = check(
        capsys, "--config", str(tmp_path / "config.yaml"), "--reward_funcs", "vlm_r1/iou"
    )
    assert code == 1
    assert texts(findings, "rewards", "fault") == [
        "vlm_r1/iou reads column 'solution', which the data has not"
    ]


def test_a_reward_that_fails_its_own_truth_is_a_fault(started, tmp_path, capsys):
    def run(solution):
        row = {"prompt": "find the 7", "image": str(started / "images" / "0.png")}
        (tmp_path / "rows.json").write_text(json.dumps([row | {"solution": solution}]))
        return check(
            capsys,
            *("--model_name_or_path", str(started / "model")),
            *("--dataset_name", str(tmp_path / "rows.json")),
            *("--reward_funcs", "vlm_r1/iou"),
        )

    code, findings = run([10, 20, 30, 40])
    assert code == 0
    assert any("pays an answer made from the solution" in t for t in texts(findings, "rewards"))
    code, findings = run("no box at all")
    assert not any("pays an answer" in text for text in texts(findings, "rewards"))


def test_a_long_image_that_the_processor_leaves_above_the_limit_is_named(started, tmp_path, capsys):
    from PIL import Image

    # 20 x 1 cells of 28 pixels, at most 4 allowed: the processor keeps one row of floor(8.9) cells.
    Image.new("RGB", (560, 28)).save(tmp_path / "long.png")
    row = {"prompt": "find the 7", "image": "long.png", "solution": [1, 2, 3, 4]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    code, findings = check(
        capsys,
        *("--model_name_or_path", str(started / "model"), "--max_pixels", str(4 * 28 * 28)),
        *("--dataset_name", str(tmp_path / "rows.json"), "--reward_funcs", "vlm_r1/iou"),
        *("--max_completion_length", "24"),
    )
    assert code == 0
    assert f"images of {560 * 28} pixels, seen as {8 * 28 * 28}" in texts(findings, "prompts")
    assert texts(findings, "prompts", "note") == ["1 of 1 long images exceed 3136 pixels there"]
