# SPDX-License-Identifier: Apache-2.0
"""What the trainer tells a reward about the images of its row."""

import json

import pytest
from PIL import Image

from fastgrpo import InputError, rewards
from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.integrations.trl.frames import drawn_frames
from fastgrpo.models.frames import frame_columns, model_frame
from fastgrpo.testing.models import tiny_model
from fastgrpo.testing.processors import tiny_processor
from fastgrpo.testing.trl import build_trainer, save_checkpoint, steps_of


def photo(path, width, height):
    """A photo of that size upright, stored on its side."""
    image = Image.new("RGB", (height, width))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    return Image.open(path)


@pytest.mark.parametrize(
    ("family", "frame"),
    [("qwen2_vl", "thousandths"), ("qwen2_5_vl", "seen"), ("qwen3_vl", "thousandths"),
     ("qwen2", None)],
)  # fmt: skip
def test_the_family_states_its_frame(family, frame):
    assert model_frame(tiny_model(family).config) == frame


def test_every_image_of_a_row_has_both_sizes(tmp_path):
    processor = tiny_processor(tiny_model("qwen2_5_vl").config)  # patches of 4, merged by 2
    images = [
        [Image.new("RGB", (16, 24)), photo(tmp_path / "a.jpg", 32, 16)],
        None,
        [Image.new("RGB", (320, 160))],
    ]
    flat = [image for row in images for image in row or ()]
    upright = [flat[0], flat[1].transpose(Image.Transpose.ROTATE_270), flat[2]]
    fields = processor.image_processor(images=upright, return_tensors="pt")
    first, second, third = frame_columns("seen", processor, images, fields)
    assert first["image_sizes"] == [(16, 24), (32, 16)] == first["seen_sizes"]
    assert second == {}
    # at most 64 merged patches of 8 x 8 pixels: 4096 pixels, so 320 x 160 becomes 88 x 40
    assert third == {
        "model_frame": "seen", "image_sizes": [(320, 160)], "seen_sizes": [(88, 40)],
        "image_grid_thw": [[1, 10, 22]],
    }  # fmt: skip
    unknown = frame_columns("seen", processor, images, {})
    assert unknown[0]["seen_sizes"] == [None, None]


def run(tmp_path, family, answer, rows, reward="vlm_r1/iou", **settings):
    """The reward of one step in which every completion is `answer`."""
    trainer = build_trainer(
        FastGRPOTrainer, save_checkpoint(tmp_path / "ck", family), tmp_path / "out", rows=rows,
        reward=rewards.get(reward, **settings), max_steps=1, beta=0.0, max_completion_length=64,
    )  # fmt: skip
    tokenizer = trainer.processing_class.tokenizer
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    trainer._generate_single_turn = lambda prompts, *args, **kw: ([ids for _ in prompts], None)
    trainer.train()
    (step,) = steps_of(trainer)
    return step["reward"], step.get("fastgrpo/reward_errors/vlm_r1_iou", 0.0)


def row(images, box, **columns):
    prompt = [{"role": "user", "content": "find"}]
    return {"prompt": prompt, "images": images, "solution": json.dumps(box), **columns}


BIG = (320, 160)  # seen as 88 x 40


@pytest.mark.parametrize(
    ("family", "answer"),
    [("qwen2_5_vl", "[22, 10, 66, 30]"), ("qwen3_vl", "[250, 250, 750, 750]"),
     ("qwen2_vl", "(250,250),(750,750)")],
)  # fmt: skip
def test_a_perfect_answer_of_each_family_is_paid_the_top(family, answer, tmp_path):
    image = photo(tmp_path / "a.jpg", *BIG)
    rows = [row([image], [80, 40, 240, 120]) for _ in range(4)]
    value, _ = run(tmp_path, family, f"<answer>{answer}</answer>", rows)
    assert value == pytest.approx(1.0, abs=1e-6)


def test_the_data_name_the_image_of_two(tmp_path):
    images = [Image.new("RGB", (16, 24)), Image.new("RGB", BIG)]
    rows = [row(images, [80, 40, 240, 120], image_index=1) for _ in range(4)]
    value, _ = run(tmp_path, "qwen2_5_vl", "<answer>[22, 10, 66, 30]</answer>", rows)
    assert value == pytest.approx(1.0, abs=1e-6)


def test_a_setting_the_family_does_not_write_stops_the_run(tmp_path):
    rows = [row([Image.new("RGB", BIG)], [80, 40, 240, 120]) for _ in range(4)]
    with pytest.raises(InputError, match="fails its own truth"):
        run(tmp_path, "qwen3_vl", "<answer>[1, 2, 3, 4]</answer>", rows, answer_frame="unit")


def test_what_pictures_need_is_recorded_per_row():
    function = rewards.get("vlm_r1/iou", solution_frame="thousandths")
    rows = [
        {"model_frame": "seen", "image_sizes": [BIG], "seen_sizes": [(88, 40)]},
        {"model_frame": "seen", "image_sizes": [BIG, (8, 8)], "seen_sizes": [(88, 40), (8, 8)],
         "image_index": 1},
        {"model_frame": "seen", "image_sizes": [BIG, (8, 8)], "seen_sizes": [(88, 40), (8, 8)]},
    ]  # fmt: skip
    rows = [{"image_index": None} | row for row in rows]
    first, second, third = drawn_frames([function], rows)
    told = {"answer": "seen", "solution": "thousandths", "image": [320, 160], "seen": [88, 40]}
    assert json.loads(first) == told | {"index": 0}
    assert json.loads(second) == told | {"image": [8, 8], "seen": [8, 8], "index": 1}
    assert third == ""
    assert drawn_frames([rewards.get("vlm_r1/format")], rows) is None
