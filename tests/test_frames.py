# SPDX-License-Identifier: Apache-2.0
"""Every reward that compares boxes or points, in every frame: the truth is paid the top."""

import base64
import io
import itertools

import numpy as np
import pytest
from frame_rows import BOX, FAR, MOVED, SEEN, SIZE, STATED, TABLE, by_hand
from PIL import Image

from fastgrpo import InputError, rewards
from fastgrpo.rewards.geometry.frames import FRAMES, RowFrames, convert, row_frames
from fastgrpo.rewards.read.faults import BadColumn
from fastgrpo.rewards.read.images import named_image


def test_the_table_holds_every_reward_that_reads_frames():
    framed = {n for n in rewards.names() if "model_frame" in rewards.get(n).optional}
    assert framed == {row[0] for row in TABLE} | {"magicgui/action"}


def exif(size):
    """A photo of `size` upright, stored on its side."""
    image = Image.new("RGB", (size[1], size[0]))
    image.getexif()[0x0112] = 6
    return image


def jpeg(size):
    """Such a photo as the bytes of its file."""
    buffer = io.BytesIO()
    photo = exif(size)
    photo.save(buffer, format="JPEG", exif=photo.getexif())
    return buffer.getvalue()


OTHER = ((100, 500), (56, 280))
SITUATIONS = {
    "one image": {"image_sizes": [SIZE], "seen_sizes": [SEEN]},
    "first of two": {
        "image_sizes": [SIZE, OTHER[0]], "seen_sizes": [SEEN, OTHER[1]], "image_index": 0,
    },
    "second of two": {
        "image_sizes": [OTHER[0], SIZE], "seen_sizes": [OTHER[1], SEEN], "image_index": 1,
    },
    "two of one size": {"image_sizes": [SIZE, SIZE], "seen_sizes": [SEEN, SEEN]},
    "a photo on its side": {"images": [exif(SIZE)], "seen_sizes": [SEEN]},
    "bytes of a photo": {"images": [jpeg(SIZE)], "seen_sizes": [SEEN]},
    "a feature's bytes": {"image": {"bytes": jpeg(SIZE), "path": None}, "seen_sizes": [SEEN]},
    "a data URI": {
        "image": "data:image/jpeg;base64," + base64.b64encode(jpeg(SIZE)).decode(),
        "seen_sizes": [SEEN],
    },
    "an array": {"images": [np.zeros((SIZE[1], SIZE[0], 3), np.uint8)], "seen_sizes": [SEEN]},
    "the data's own size": {
        "image_size": list(SIZE), "images": [Image.new("RGB", (9, 7))], "seen_sizes": [SEEN],
    },
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_truth_is_paid_the_top_and_a_moved_box_its_overlap(row, situation):
    name, settings, columns, answer, solution, moved = row
    function = rewards.get(name, **settings)
    top = {"vlm_r1/cosine_accuracy": 1.0}.get(name, function.range[1])
    for said, truth in itertools.product(STATED, STATED):
        given = {
            "solution": solution([by_hand(BOX, truth), by_hand(FAR, truth)]),
            "solution_frame": truth, "model_frame": said, **columns, **SITUATIONS[situation],
        }  # fmt: skip
        given = {key: [value] * 2 for key, value in given.items()}
        texts = [answer([by_hand(box, said), by_hand(FAR, said)]) for box in (BOX, MOVED)]
        values = function(["one group", "another"], texts, **given)
        assert values == pytest.approx([top, moved], abs=1e-6), (said, truth)


def test_rounded_thousandths_are_right_within_their_rounding():
    box = [81, 61, 163, 177]
    said = [round(v) for v in by_hand(box, "thousandths")]
    columns = {"solution": [box], "model_frame": ["thousandths"], "image_sizes": [[SIZE]]}
    (value,) = rewards.get("vlm_r1/iou")(None, [f"<answer>{said}</answer>"], **columns)
    assert 0.98 < value < 1


def test_a_column_beats_a_setting_and_a_setting_the_family():
    text = f"<answer>{by_hand(BOX, 'unit')}</answer>"
    sizes = {"solution": [BOX], "image_sizes": [[SIZE]], "seen_sizes": [[SEEN]]}
    get = rewards.get

    def value(function, **columns):
        return function(None, [text], **sizes, **columns)[0]

    family = {"model_frame": ["thousandths"]}
    assert value(get("vlm_r1/iou"), **family) < 0.01
    assert value(get("vlm_r1/iou", answer_frame="unit"), **family) == pytest.approx(1)
    seen = get("vlm_r1/iou", answer_frame="seen")
    assert value(seen, answer_frame=["unit"], **family) == pytest.approx(1)
    assert value(seen, answer_frame=[None], **family) < 0.01
    with pytest.raises(InputError, match="expected one of image, seen"):
        value(get("vlm_r1/iou", answer_frame="pixels"))
    with pytest.raises(InputError, match="got 'percent'"):
        value(seen, answer_frame=["percent"])


def test_rows_of_a_batch_keep_their_own_frames():
    boxes = [by_hand(BOX, frame) for frame in ("image", "seen", "thousandths")]
    columns = {
        "solution": [BOX] * 3,
        "answer_frame": ["image", "seen", "thousandths"],
        "image_sizes": [[SIZE]] * 3,
        "seen_sizes": [None, [SEEN], [None]],
    }
    texts = [f"<answer>{box}</answer>" for box in boxes]
    assert rewards.get("vlm_r1/iou")(None, texts, **columns) == pytest.approx([1, 1, 1])
    swapped = rewards.get("vlm_r1/iou")(None, texts[::-1], **columns)
    assert max(swapped[0], swapped[2]) < 0.5


@pytest.mark.parametrize(
    "columns",
    [
        {"image_sizes": [SIZE, OTHER[0]], "seen_sizes": [SEEN, OTHER[1]]},  # which of the two?
        {"image_sizes": [SIZE]},  # the size seen is not known
        {"image_sizes": [SIZE], "seen_sizes": [None]},
        {"seen_sizes": [SEEN]},  # the size of the image is not known
        {"image_path": ["no/such/file.png"], "seen_sizes": [SEEN]},
        {"image_sizes": [SIZE], "seen_sizes": [SEEN, SEEN]},
        {"image_sizes": [SIZE], "seen_sizes": [SEEN], "image_index": 1},
    ],
)
@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_what_is_not_known_is_not_scored(row, columns):
    name, settings, own, answer, solution, _ = row
    given = {"model_frame": "seen", "solution": solution([BOX, FAR]), **own, **columns}
    text = answer([by_hand(BOX, "seen"), by_hand(FAR, "seen")])
    rewards.reset_stats()
    value = rewards.get(name, **settings)(None, [text], **{k: [v] for k, v in given.items()})
    assert value == [None]
    reasons = " ".join(rewards.stats()[name])
    assert "bad_column" in reasons and ("frame" in reasons or "image_index" in reasons)


def test_published_behaviour_never_converts():
    columns = {"solution": [f"<answer>{BOX}</answer>"], "model_frame": ["thousandths"]}
    columns |= {"image_sizes": [[SIZE]], "seen_sizes": [[SEEN]]}
    text = f"<answer>{BOX}</answer>"
    # The -1/+1 convention: 79 x 119 pixels and the row and column of +1, over twice the area less.
    inter = 80 * 120
    assert rewards.get("vlm_r1/iou", compat="upstream")(None, [text], **columns) == [
        inter / (2 * 80 * 120 - inter)
    ]


def test_points_of_an_action_are_thousandths_whatever_the_family():
    function = rewards.get("magicgui/action")
    solution = {"type": "click", "point": [0.25, 0.5], "boxes": [[0.45, 0.2, 0.1, 0.1]]}
    columns = {"solution": [solution], "model_frame": ["seen"], "image_sizes": [[SIZE]]}
    assert function(None, ['{"POINT": [250, 500]}'], **columns) == [1.0]
    pixels = rewards.get("magicgui/action", answer_frame="image", solution_frame="image")
    x, y = 80, 120
    in_pixels = {"type": "click", "point": [x, y], "boxes": [[108, 64, 24, 32]]}
    columns = {"solution": [in_pixels], "image_sizes": [[SIZE]]}
    assert pixels(None, [f'{{"POINT": [{x}, {y}]}}'], **columns) == [1.0]
    assert pixels(None, ['{"POINT": [200, 20]}'], **columns) == [0.5]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FRAMES, FRAMES)))
def test_conversion_there_and_back_is_the_same_box(source, target):
    sizes = {"image": SIZE, "seen": SEEN}
    box = [3.0, 5.0, 7.0, 11.0]
    there = convert(box, source, target, **sizes)
    assert convert(there, target, source, **sizes) == pytest.approx(box)
    table = np.array([box, box]).reshape(2, 4)
    assert convert(table, source, target, **sizes) == pytest.approx(np.array([there, there]))
    centre = np.array([box[:2], box[2:]])
    assert convert(centre, source, target, **sizes).reshape(-1) == pytest.approx(there)
    assert convert(np.empty((0, 4)), source, target, **sizes).shape == (0, 4)
    polygon = convert([*box, *box[:2]], source, target, **sizes)
    assert polygon == pytest.approx([*there, *there[:2]])


def test_location_tokens_are_a_box_written_y_first():
    said = "<loc0256><loc0512><loc0768><loc1023> cat"
    box = [512 / 1024 * 320, 256 / 1024 * 240, 1023 / 1024 * 320, 768 / 1024 * 240]
    columns = {"solution": [box], "model_frame": ["locations"], "image_sizes": [[SIZE]]}
    value = rewards.get("vlm_r1/iou")(None, [f"<answer>{said}</answer>"], **columns)
    assert value == [pytest.approx(1)]


def test_a_frame_is_needed_only_where_it_is_used():
    assert row_frames({"solution": [BOX]}, 1, {})[0].to_solution(BOX) == BOX
    same = RowFrames("thousandths", "thousandths", {})
    assert same.to_solution(BOX) == BOX
    with pytest.raises(BadColumn, match="size of the image"):
        same.answer_in("image", BOX)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("the cat in the second image", 1), ("Image 2: [1, 2, 3, 4]", 1), ("in image #1", 0),
        ("the last picture", 2), ("Figure 3 shows it", 2), ("第二张图", 1), ("图3中的猫", 2),
        ("第1张图片", 0), ('{"image_index": 0, "bbox_2d": [1, 2, 3, 4]}', 0), ("<image_2>", 1),
        ("the 2nd photo", 1), ("image two", 1), ("images 1 and 2: image 1, image 2", None),
        ("image 4", None), ("image 0", None), ("the image", None), ("a photo of 2 cats", None),
        ("the first cat in the third image", 2), ('{"bbox_2d": [2, 2, 3, 4]}', None), ("", None),
        ("Image 2 is as image 2 was", 1),
    ],
)  # fmt: skip
def test_an_image_is_named_in_words(text, index):
    assert named_image(text, 3) == index


NAMED = {"image_sizes": [[OTHER[0], SIZE]], "seen_sizes": [[OTHER[1], SEEN]]}


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_an_image_named_by_the_question_or_the_answer_gives_the_sizes(row):
    name, settings, own, answer, solution, _ = row
    function = rewards.get(name, **settings)
    given = {"solution": [solution([BOX, FAR])], "model_frame": ["seen"], **NAMED}
    given |= {key: [value] for key, value in own.items()}
    text = answer([by_hand(BOX, "seen"), by_hand(FAR, "seen")])
    top = {"vlm_r1/cosine_accuracy": 1.0}.get(name, function.range[1])
    question = [{"role": "user", "content": "Where is it in the second image?"}]
    assert function([question], [text], **given) == [pytest.approx(top)]
    assert function(["Where is it in image 1?"], [text], **given) != [pytest.approx(top)]
    assert function(["Where?"], [text], **given) == [None]
    given["image_index"] = [1]  # the data's column is believed before words
    assert function(["in the first image"], [text], **given) == [pytest.approx(top)]


def test_an_answer_may_name_its_image():
    function = rewards.get("vlm_r1/iou")
    box = by_hand(BOX, "seen")
    given = {"solution": [BOX], "model_frame": ["seen"], **NAMED}
    for said in (f"Image 2: {box}", f'{{"image_index": 1, "bbox_2d": {box}}}', f"第二张图 {box}"):
        assert function(["Where?"], [f"<answer>{said}</answer>"], **given) == [pytest.approx(1)]
    assert function(["Where?"], [f"<answer>{box}</answer>"], **given) == [None]
    thought = "<think>Not in image 1, but in image 2.</think>"
    assert function(["Where?"], [f"{thought}<answer>{box}</answer>"], **given) == [None]
    said = f"{thought}<answer>Image 2: {box}</answer>"
    assert function(["Where?"], [said], **given) == [pytest.approx(1)]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_a_family_without_a_frame_is_not_scored_until_somebody_states_one(row):
    name, settings, own, answer, solution, _ = row
    given = {"solution": solution([BOX, FAR]), "model_frame": "unstated", **own}
    given = {k: [v] for k, v in (given | SITUATIONS["one image"]).items()}
    text = answer([BOX, FAR])
    rewards.reset_stats()
    assert rewards.get(name, **settings)(None, [text], **given) == [None]
    assert "states none" in " ".join(rewards.stats()[name])
    function = rewards.get(name, **settings, answer_frame="image")
    top = {"vlm_r1/cosine_accuracy": 1.0}.get(name, function.range[1])
    assert function(None, [text], **given) == [pytest.approx(top)]
