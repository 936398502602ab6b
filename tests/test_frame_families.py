# SPDX-License-Identifier: Apache-2.0
"""Families, images and frames together: what is paid, and what the report draws.

The sizes a model saw are those of Qwen's own image processor (patches of 14, merged by 2, so sides
are multiples of 28), by hand:

    320 x 240                       11.4 and 8.6 patches of 28: 308 x 252
    at most 40,000 pixels           by sqrt(76,800 / 40,000), rounded down: 224 x 168
    at least 200,000 pixels         by sqrt(200,000 / 76,800), rounded up: 532 x 392
"""

import json

import pytest
from frame_rows import BOX, FAR, MOVED, SIZE, TABLE, by_hand
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from fastgrpo import rewards
from fastgrpo.evaluation import task
from fastgrpo.images import load_image
from fastgrpo.integrations.trl.frames import drawn_frames
from fastgrpo.models import families
from fastgrpo.models.frames import frame_columns, model_frame
from fastgrpo.report.pictures import drawn_shapes
from fastgrpo.rewards.geometry.frames import FRAMES, UNSTATED
from fastgrpo.testing.models import tiny_model

STATING = {
    "qwen2_vl": "thousandths", "qwen2_5_vl": "seen", "qwen3_vl": "thousandths",
    "qwen3_vl_moe": "thousandths", "qwen3_5": "thousandths", "qwen3_5_moe": "thousandths",
    "internvl": "thousandths", "glm4v": "thousandths", "glm46v": "thousandths",
}  # fmt: skip
SILENT = {"gemma3", "llava", "llava_next", "mistral3", "smolvlm", "idefics3"}
TRUTHS = ("image", "seen", "thousandths", "unit")


def test_every_family_with_images_states_its_frame_or_that_it_has_none():
    vision = {name for name, family in families().items() if family.vision_inputs}
    stated = {name: families()[name].coordinates for name in vision}
    assert {name for name, told in stated.items() if told is None} >= SILENT
    assert {name for name, told in stated.items() if told is not None} >= set(STATING)
    assert all(told.source for told in stated.values() if told is not None)
    for name in ("qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"):
        assert model_frame(tiny_model(name).config) == STATING.get(name, UNSTATED)
    assert model_frame(tiny_model("qwen2").config) is None


def photo(folder, kind):
    """A picture of SIZE upright, as a file, stored on its side where asked."""
    path = folder / f"{kind}.jpg"
    if kind == "exif":
        image = Image.new("RGB", (SIZE[1], SIZE[0]))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    else:
        Image.new("RGB", SIZE).save(path)
    return str(path)


OTHER = (100, 500)
# name: limits of pixels, images, which one is meant, size it is seen in
SITUATIONS = {
    "one image": ({}, ["plain"], None, (308, 252)),
    "two images": ({}, ["other", "plain"], 1, (308, 252)),
    "EXIF": ({}, ["exif"], None, (308, 252)),
    "at most so many pixels": ({"longest_edge": 40_000}, ["plain"], None, (224, 168)),
    "at least so many pixels": ({"shortest_edge": 200_000}, ["plain"], None, (532, 392)),
}


def told(folder, situation, family):
    """(the columns a trainer or an evaluation hands over for one row, the size seen)."""
    limits, kinds, index, seen = SITUATIONS[situation]
    size = {"shortest_edge": 28 * 28, "longest_edge": 10**7} | limits
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size)
    images = [Image.new("RGB", OTHER) if k == "other" else photo(folder, k) for k in kinds]
    upright = [load_image(image) for image in images]
    fields = processor(images=upright, return_tensors="pt")
    (columns,) = frame_columns(STATING[family], processor, [images], fields)
    return columns | ({} if index is None else {"image_index": index}), seen


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("family", STATING)
def test_every_reward_pays_the_truth_its_top_and_a_moved_box_its_overlap(
    family, situation, tmp_path
):
    frames, seen = told(tmp_path, situation, family)
    assert frames["image_sizes"][-1] == SIZE and frames["seen_sizes"][-1] == seen
    said = STATING[family]
    for name, settings, own, answer, solution, moved in TABLE:
        function = rewards.get(name, **settings)
        top = {"vlm_r1/cosine_accuracy": 1.0}.get(name, function.range[1])
        texts = [
            answer([by_hand(box, said, seen=seen), by_hand(FAR, said, seen=seen)])
            for box in (BOX, MOVED)
        ]
        for truth in TRUTHS:
            boxes = [by_hand(box, truth, seen=seen) for box in (BOX, FAR)]
            given = {"solution": solution(boxes), "solution_frame": truth, **own, **frames}
            given = {key: [value] * 2 for key, value in given.items()}
            values = function(["q", "p"], texts, **given)
            assert values == pytest.approx([top, moved], abs=1e-6), (name, truth)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("family", STATING)
def test_the_report_draws_the_same_boxes(family, situation, tmp_path):
    frames, seen = told(tmp_path, situation, family)
    said = STATING[family]
    text = f"<answer>{by_hand(MOVED, said, seen=seen)}</answer>"
    for truth in TRUTHS:
        row = {"prompt": "q", "solution": json.dumps(by_hand(BOX, truth, seen=seen)), **frames}
        function = rewards.get("vlm_r1/iou", solution_frame=truth)
        (drawn,) = drawn_frames([function], [row], [text])
        assert json.loads(drawn)["index"] == len(frames["image_sizes"]) - 1
        boxes = drawn_shapes({"solution": row["solution"], "frames": drawn}, text)
        assert close_to(boxes[0], [BOX]) and close_to(boxes[1], [MOVED]), truth


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("family", STATING)
def test_an_evaluation_measures_in_the_same_frames(family, situation, tmp_path):
    frames, seen = told(tmp_path, situation, family)
    said = STATING[family]
    texts = [f"<answer>{by_hand(box, said, seen=seen)}</answer>" for box in (BOX, MOVED)]
    for truth in TRUTHS:
        row = {"solution": json.dumps(by_hand(BOX, truth, seen=seen)), "prompt": "q", **frames}
        scored, figures = task("rec")([row, row], texts, solution_frame=truth)
        values = [one.value for one in scored]
        assert values == pytest.approx([1, 1 / 3], abs=1e-6), truth
        assert figures["mean_iou"] == pytest.approx(2 / 3, abs=1e-6)
        assert close_to(scored[1].truth, [BOX]) and close_to(scored[1].said, [MOVED])


def test_an_evaluation_follows_an_image_named_in_words(tmp_path):
    frames, seen = told(tmp_path, "two images", "qwen2_5_vl")
    del frames["image_index"]
    row = {"solution": str(BOX), "prompt": [{"role": "user", "content": "second image?"}], **frames}
    text = f"<answer>{by_hand(BOX, 'seen', seen=seen)}</answer>"
    (one,), _ = task("rec")([row], [text])
    assert one.value == pytest.approx(1)


def close_to(boxes, expected):
    return [pytest.approx(box, abs=1e-6) for box in expected] == boxes


@pytest.mark.parametrize("situation", ["two images"])
def test_the_report_follows_an_image_named_in_words(situation, tmp_path):
    frames, seen = told(tmp_path, situation, "qwen2_5_vl")
    del frames["image_index"]
    function, text = (
        rewards.get("vlm_r1/iou"),
        f"<answer>{by_hand(BOX, 'seen', seen=seen)}</answer>",
    )
    for prompt, index in (("in the second image?", 1), ("in image 1?", 0), ("where?", None)):
        row = {"prompt": [{"role": "user", "content": prompt}], "solution": str(BOX), **frames}
        (drawn,) = drawn_frames([function], [row], [text])
        assert (json.loads(drawn)["index"] if drawn else None) == index


def test_rounded_thousandths_and_locations_are_right_within_their_rounding():
    for frame, top in (("thousandths", 1000), ("thousandths_yx", 1000), ("locations", 1023)):
        assert frame in FRAMES
        box = [81, 61, 163, 177]
        columns = {"solution": [box], "model_frame": [frame], "image_sizes": [[SIZE]]}
        exact = [v / s for v, s in zip(box, SIZE * 2, strict=True)]
        x1, y1, x2, y2 = (min(round(v * (1024 if top == 1023 else top)), top) for v in exact)
        if frame == "locations":
            said = "".join(f"<loc{v:04d}>" for v in (y1, x1, y2, x2))
        else:
            said = [x1, y1, x2, y2] if frame == "thousandths" else [y1, x1, y2, x2]
        (value,) = rewards.get("vlm_r1/iou")(None, [f"<answer>{said}</answer>"], **columns)
        # Each corner is off by at most half a step: 0.16 pixels across, 0.12 down.
        assert 1 - 4 * (0.5 * 320 / 1000 / 82 + 0.5 * 240 / 1000 / 116) < value <= 1
