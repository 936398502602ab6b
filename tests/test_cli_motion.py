# SPDX-License-Identifier: Apache-2.0
"""Data in motion from the command line: stages in order, a file that grows, dynamic sampling."""

import json

import pytest
from PIL import Image

pytest.importorskip("trl")

from fastgrpo import InputError  # noqa: E402
from fastgrpo.cli.data import load_data  # noqa: E402
from fastgrpo.cli.train import build_trainer, main, parse  # noqa: E402
from fastgrpo.testing.trl import save_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion")
    save_checkpoint(folder / "model")
    Image.new("RGB", (16, 24)).save(folder / "a.png")
    for name, count in (("easy", 3), ("hard", 2)):
        rows = [
            {
                "image": "a.png",
                "conversations": [{"value": f"<image>{name} {i}"}, {"value": "[1, 2, 3, 4]"}],
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def distinct(completions, **_):\n"
        "    return [float(len(set(c[0]['content']))) for c in completions]\n"
    )
    return folder


def arguments(job, out, *options):
    return [
        *("--model_name_or_path", str(job / "model"), "--output_dir", str(out)),
        *("--question_template", "{Question}", "--reward_funcs", f"{job}/reward.py:distinct"),
        *("--num_generations", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1"),
        *("--max_completion_length", "4", "--disable_tqdm", "true", "--save_strategy", "no"),
        *options,
    ]


def test_files_are_stages(job, tmp_path):
    files = f"{job}/easy.jsonl:{job}/hard.jsonl"
    options = ("--data_file_paths", files, "--stage_epochs", "2", "1")
    config, model = parse(arguments(job, tmp_path, *options))
    train, _ = load_data(config)
    assert [p.split()[0] for p in train["problem"]] == ["easy"] * 6 + ["hard"] * 2
    assert train[0]["images"][0].size == (16, 24) and train.quarantined == []
    assert sorted(train["problem"][:3]) == sorted(train["problem"][3:6])
    trainer = build_trainer(config, model)
    trainer.train()
    assert trainer.state.max_steps == 8  # each row once, in the order of the stages
    assert trainer.args.shuffle_dataset is False


def test_a_growing_file_trains(job, tmp_path):
    options = ("--data_file_paths", f"{job}/easy.jsonl", "--growing_rows", "2")
    main(arguments(job, tmp_path, *options, "--max_steps", "2", "--max_generation_batches", "2"))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 2 and all("fastgrpo/generation_batches" in entry for entry in steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stage_epochs", "1"), "stage_epochs: 1 counts for 2 of data_file_paths"),
        (("--stage_epochs", "0", "0"), "expected counts of which one is above 0"),
        (("--stage_epochs", "1", "1", "--growing_rows", "3"), "exclude each other"),
        (("--stage_epochs", "1", "1", "--val_split_ratio", "0.5"), "exclude each other"),
        (("--growing_rows", "3"), "growing_rows: one file grows"),
        (("--growing_rows", "0"), "growing_rows: expected a number above 0"),
        (
            ("--growing_rows", "3", "--dataloader_num_workers", "1", "--data_file_paths", "x"),
            "growing_rows: one process without dataloader workers",
        ),
    ],
)
def test_what_cannot_be_is_refused(job, tmp_path, options, message):
    files = ("--data_file_paths", f"{job}/easy.jsonl:{job}/hard.jsonl")
    with pytest.raises(InputError, match=message):
        load_data(parse(arguments(job, tmp_path, *files, *options))[0])
