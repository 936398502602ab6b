# SPDX-License-Identifier: Apache-2.0
"""Wrong turns of a new user: each ends in one line that names the setting, never in a traceback."""

import fcntl
import json
import re
import sys

import pytest
import yaml
from PIL import Image

pytest.importorskip("trl")

from fastgrpo.cli import main  # noqa: E402
from fastgrpo.cli.check import check  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    save_checkpoint(folder / "model")
    Image.new("RGB", (16, 24)).save(folder / "0.png")
    turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "[1, 2, 3, 4]"}]
    row = {"image": "0.png", "conversations": turns}
    (folder / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    (folder / "lost.jsonl").write_text(json.dumps(row | {"image": "lost.png"}))
    (folder / "taken.jsonl").write_text(json.dumps(row | {"completions": 1}))
    (folder / "table.jsonl").write_text('{"text": "x"}')
    (folder / "broken.json").write_text('[{"prompt": ')
    (folder / "empty.jsonl").touch()
    (folder / "file").touch()
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "broken.yaml").write_text("a: [1\nb: 2")
    (folder / "reward.py").write_text("constant = 3\ndef broken(completions, **_): return 1 +\n")
    (folder / "half" / "checkpoint-3").mkdir(parents=True)
    (folder / "busy").mkdir()
    config = dict(
        model_name_or_path=str(folder / "model"),
        data_file_paths=str(folder / "rows.jsonl"),
        output_dir=str(folder / "run"),
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=4,
        max_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


# what is added to a command that works -> what the one line holds
WRONG = {
    "--config {job}/none.yaml": "config: .*none.yaml cannot be read",
    "--config {job}/list.yaml": "config: .*list.yaml must hold settings",
    "--config {job}/broken.yaml": "config: .*broken.yaml is not YAML",
    "stray": "'stray': a setting is written --name value",
    "--num_generation 4": "num_generation: .* did you mean num_generations",
    "--num_generations four": "num_generations.*invalid int value: 'four'",
    "--num_generations": "num_generations.*expected one argument",
    "--num_generations 3": "divisible by num_generations",
    "--per_device_train_batch_size 12": "12 completions .* of 3 prompts, and the data has 2 rows",
    "--data_sampling some": "data_sampling: expected all, first:N",
    "--num_generations 1": "num_generations|at least 2",
    "--learning_rate fast": "learning_rate.*invalid float value",
    "--bf16 maybe": "bf16.*[Tt]ruthy value expected",
    "--loss_type best": "loss_type: expected one of .*dapo.*, got 'best'",
    "--reward_compat both": "reward_compat: expected one of fixed, upstream",
    "--model_name_or_path {job}/none": "model_name_or_path: no processor in",
    "--model_name_or_path nobody/nothing": "model_name_or_path: no processor in 'nobody/nothing'",
    "--model_name_or_path {job}/rows.jsonl": "model_name_or_path: no processor in",
    "--data_file_paths {job}/none.jsonl": "data_file_paths: .*none.jsonl is not a file",
    "--data_file_paths {job}": "data_file_paths: .* is not a file",
    "--data_file_paths {job}/empty.jsonl": "no usable row",
    "--data_file_paths {job}/lost.jsonl": "no usable row .*lost.jsonl:1: .*lost.png does not exist",
    "--data_file_paths {job}/taken.jsonl": "taken.jsonl:1: column 'completions'",
    "--data_file_paths {job}/broken.json": "broken.json is not a JSON array",
    "--image_folders {job}/none": "image_folders: .*none is not a folder",
    "--image_folders {job}:{job}": "image_folders 2, .* must be equal",
    "--dataset_name {job}/table.jsonl": "data_file_paths and dataset_name exclude each other",
    "--question_template hello": "question_template must contain {{Question}} once",
    "--verify_images all": "verify_images must be one of header, decode, none",
    "--max_image_pixels 0": "max_image_pixels: expected a number above 0",
    "--max_pixels 10": "max_pixels: 10 is below the processor's own minimum",
    "--min_pixels 900 --max_pixels 800": "min_pixels: 900 is above max_pixels, 800",
    "--val_split_ratio 2": r"val_split_ratio must be in \[0, 1\)",
    "--eval_strategy steps --eval_steps 1": "eval_strategy: .* needs rows to evaluate",
    "--val_split_ratio 0.5 --eval_data_file_paths x": "val_split_ratio and eval_data.* exclude",
    "--reward_funcs vlm_r1/nothing": "vlm_r1/nothing",
    "--reward_funcs no_module:f": "reward_funcs: 'no_module:f' cannot be imported",
    "--reward_funcs {job}/reward.py:f": "reward_funcs: .* cannot be imported: .*invalid syntax",
    "--reward_funcs {job}/none.py:f": "reward_funcs: .* cannot be imported",
    "--reward_funcs vlm_r1/iou --reward_weights 1 2": "reward_weights: 2 for the 1 of reward_funcs",
    "--recipe nothing": "nothing",
    "--output_dir {job}/file": "output_dir: .*file is a file",
    "--resume_from_checkpoint {job}/half/checkpoint-3": "resume_from_checkpoint: .* is incomplete",
    "--backend fastest": "backend: expected one of .*dense.*, got 'fastest'",
    "--output_dir {job}/busy": "output_dir: .*busy is being written by",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_turn_is_one_line_and_a_check_finds_it(job, wrong):
    options = wrong.format(job=job).split()
    config = [] if "--config" in options else ["--config", str(job / "config.yaml")]
    expected = WRONG[wrong].replace("{{", "{").replace("}}", "}")
    with (job / "busy" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            main(["train", *options, *config])
        faults = [found.text for found in check([*options, *config]) if found.state == "fault"]
    message = str(stop.value.code)
    assert message.startswith("fastgrpo train: ") and "\n" not in message
    assert len(message) < 800
    assert re.search(expected, message), message
    assert any(re.search(expected, fault) and "\n" not in fault for fault in faults), faults


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastgrpo.cli.eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        SystemExit, match=r"^fastgrpo eval: needs trl: pip install 'fastgrpo\[trl]'"
    ):
        main(["eval", "x"])


def test_nothing_at_all_names_what_is_missing():
    with pytest.raises(SystemExit, match="fastgrpo train: model_name_or_path is required"):
        main(["train"])
    with pytest.raises(SystemExit, match="fastgrpo train: data_file_paths is required, or"):
        main(["train", "--model_name_or_path", "x"])


def test_a_table_without_a_prompt_is_named(job):
    options = ["--model_name_or_path", str(job / "model"), "--output_dir", str(job / "run")]
    with pytest.raises(SystemExit, match="table.jsonl has no column prompt.* columns are text"):
        main(["train", *options, "--dataset_name", str(job / "table.jsonl")])
