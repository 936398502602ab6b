# SPDX-License-Identifier: Apache-2.0
"""The main job, tiny: data, policy, warm start, and two GRPO steps down to the report."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("sklearn")

from PIL import Image

from fastgrpo.checkpoints.packed import unpack
from fastgrpo.demo import __main__ as demo
from fastgrpo.demo import data, model, warm_start
from fastgrpo.demo.evaluate import evaluate, load, read_jsonl
from fastgrpo.report.run import HELD_OUT_FILE

PACKED_BYTES = 1_000_000


@pytest.fixture(scope="module")
def processor():
    return model.build_processor()


@pytest.fixture
def torch_settings():
    threads, deterministic = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_write_split_is_deterministic_by_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        data.write_split(tmp_path / name, "train", 5, seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a["train.jsonl"] != c["train.jsonl"]
    assert len(a) == 6


def test_write_split_is_vlm_r1_jsonl(tmp_path):
    path = data.write_split(tmp_path, "heldout", 4, 0)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        question, answer = (turn["value"] for turn in row["conversations"])
        assert question.startswith("<image>")
        assert row["accu_reward_method"] == "iou"
        assert len(json.loads(answer)) == 4
        with Image.open(tmp_path / "images" / row["image"]) as image:
            assert image.format == "PNG"


def test_source_digits_of_the_splits_are_disjoint():
    from sklearn.datasets import load_digits

    counts = {split: len(data.source_digits(split)[0]) for split in ("train", "heldout")}
    assert sum(counts.values()) == len(load_digits().target)
    assert counts["heldout"] > 400
    with pytest.raises(ValueError, match="test"):
        data.source_digits("test")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_draw_scene_asks_for_one_digit_in_a_tight_box(split):
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(100):
        scene = data.draw_scene(rng, split)
        sizes.add(scene.image.size)
        x1, y1, x2, y2 = scene.box
        row, column = y1 // data.CELL, x1 // data.CELL
        assert 0 <= x1 < x2 <= scene.image.width and 0 <= y1 < y2 <= scene.image.height
        assert ((y2 - 1) // data.CELL, (x2 - 1) // data.CELL) == (row, column)
        assert scene.cells[row, column] == scene.digit
        assert (scene.cells == scene.digit).sum() == 1
        assert str(scene.digit) in scene.question
        inside = np.asarray(scene.image)[y1:y2, x1:x2].min(-1) < 255
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.any()
        cell = np.asarray(scene.image)[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]
        assert (cell.min(-1) < 255).sum() == inside.sum()
    assert len(sizes) == 9


def test_image_processor_never_resizes(processor):
    rng = np.random.default_rng(1)
    images = [data.draw_scene(rng, "train").image for _ in range(30)]
    grids = processor.image_processor(images, return_tensors="pt")["image_grid_thw"]
    assert [(14 * w, 14 * h) for _, h, w in grids.tolist()] == [i.size for i in images]


def test_tokenizer_round_trip_and_one_token_per_number(processor):
    tokenizer, rng = processor.tokenizer, np.random.default_rng(2)
    for _ in range(100):
        scene = data.draw_scene(rng, "heldout")
        text = data.answer(scene.digit, scene.box)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        # Four tags, digit and cell, four numbers, three commas, two brackets.
        assert len(ids) == 15
        question = tokenizer(scene.question).input_ids
        assert tokenizer.unk_token_id not in ids + question
        assert tokenizer.decode(question) == scene.question


def test_make_batch_targets_follow_the_completion(processor):
    batch = warm_start.make_batch(processor, np.random.default_rng(0), 6)
    tokenizer, ids = processor.tokenizer, batch.inputs["input_ids"]
    think = tokenizer.convert_tokens_to_ids("<think>")
    for row, targets in zip(ids.tolist(), batch.targets.tolist(), strict=True):
        start = row.index(think)
        assert targets[start - 1 : -1] == row[start:]
        assert targets[-1] == warm_start.IGNORE
        asked = [i for i in range(start - 1) if targets[i] != warm_start.IGNORE]
        assert [row[i] for i in asked] == [row[start + 1]]
        assert targets[asked[0]] == row[start + 2]
    assert batch.image.sum() == len(batch.digits) == len(batch.places)
    assert batch.digits.max() <= 10 and batch.places.max() < len(model.CELLS)


def test_jittered_stays_a_box_on_the_canvas():
    rng = np.random.default_rng(0)
    limit = data.CELL * data.MAX_CELLS
    for box in ((0, 0, 3, 14), (limit - 3, limit - 14, limit, limit), (40, 40, 60, 62)):
        for _ in range(100):
            x1, y1, x2, y2 = warm_start.jittered(box, rng)
            assert 0 <= x1 < x2 <= limit and 0 <= y1 < y2 <= limit
            if box == (40, 40, 60, 62):
                moved = np.abs(np.array((x1, y1, x2, y2)) - box).max()
                assert moved <= warm_start.JITTER


def test_warm_start_command_is_bitwise_reproducible_and_reloads(
    tmp_path, monkeypatch, torch_settings
):
    monkeypatch.setattr(warm_start, "BATCH_SIZE", 4)
    monkeypatch.setattr(warm_start.train, "__defaults__", (4, warm_start.SEED))
    for name in "ab":
        argv = ["warm_start", "--out", str(tmp_path / name), "--steps", "2"]
        monkeypatch.setattr(sys, "argv", argv)
        warm_start.main()
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert sum(map(len, files_of(tmp_path / "a").values())) < 2_000_000
    policy, processor = load(unpack(tmp_path / "a", tmp_path / "loads"))
    assert policy.config.model_type == "qwen2_5_vl"
    assert 9e5 < sum(p.numel() for p in policy.parameters()) < 1.1e6
    batch = warm_start.make_batch(processor, np.random.default_rng(0), 2)
    assert torch.isfinite(policy(**batch.inputs).logits).all()


def test_round_weights_takes_the_nearest_number_of_few_bits():
    layer = torch.nn.Linear(50, 50, bias=False)
    start = torch.randn(50, 50) * 2.0 ** torch.arange(-25, 25)
    start[0, :4] = torch.tensor([0.0, 1.0, -31 * 2.0**-9, 31.5])
    layer.weight.data.copy_(start)
    warm_start.round_weights(layer)
    assert layer.weight[0, :4].tolist() == [0.0, 1.0, -31 * 2.0**-9, 32.0]
    assert torch.equal(layer.weight, layer.weight.bfloat16().float())
    unit = 2.0 ** (torch.frexp(start).exponent - warm_start.SIGNIFICANT_BITS)
    assert ((layer.weight - start).abs() <= unit / 2).all()
    assert torch.equal(layer.weight / unit, (layer.weight / unit).round())


def test_committed_warm_start_is_small_and_writes_the_format(tmp_path):
    assert sum(len(file.read_bytes()) for file in demo.WARM_START.iterdir()) < PACKED_BYTES
    path = data.write_split(tmp_path, "heldout", 32, 5)
    policy, processor = load(unpack(demo.WARM_START, tmp_path / "policy"))
    stored = [weight.clone() for weight in policy.parameters()]
    warm_start.round_weights(policy)
    assert all(map(torch.equal, policy.parameters(), stored))
    figures = evaluate(policy, processor, path)
    assert figures == evaluate(policy, processor, path)
    assert figures.num_images == len(read_jsonl(path)) == 32
    assert figures.sampled_format > 0.9
    assert 0.05 < figures.sampled_iou < 1


def test_demo_two_steps_leave_a_checkpoint_and_a_report(tmp_path, capsys):
    overrides = ("--max_steps", "2", "--per_device_train_batch_size", "16")
    out = tmp_path / "run"
    result = demo.run(out, 1, train_samples=8, held_out_samples=8, overrides=overrides)
    assert json.loads((out / HELD_OUT_FILE).read_text()) == result
    assert result["before"]["num_images"] == result["after"]["num_images"] == 8
    before, after = load(out / "warm_start")[0], load(out)[0]
    changed = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert any(changed)
    page = (out / "report" / "report.html").read_text()
    for part in ("Where a step", "Completions", "vlm_r1_iou", "vlm_r1_format", "held-out IoU"):
        assert part in page
    assert "Not in this report" not in page
    shown = capsys.readouterr()
    printed = shown.out
    assert len(printed.splitlines()) + shown.err.count("\n") < 60 - 20  # a whole run logs 20 steps
    assert str(out / "report" / "report.html") in printed
    assert "held-out before" in printed and "held-out after" in printed
