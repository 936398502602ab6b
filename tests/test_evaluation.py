# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation: by hand, as pycocotools has them, as VLM-R1's scripts print them."""

import json

import numpy as np
import orjson
import pytest
from coco import coco_stats

from fastgrpo import InputError
from fastgrpo.evaluation import TASKS, task
from fastgrpo.evaluation.answer_file import AnswerFile
from fastgrpo.evaluation.answers import Answer
from fastgrpo.evaluation.vlm_r1_scripts import SCRIPTS


def answered(content):
    return f"<think>t</think><answer>{content}</answer>"


def box_row(box, **columns):
    return {"solution": f"<answer> {json.dumps(box)} </answer>", **columns}


def test_grounding_by_hand():
    rows = [box_row([0, 0, 10, 10])] * 5 + [box_row("a dog")]
    texts = [
        answered("[0, 0, 10, 10]"),
        answered('{"bbox_2d": [0, 0, 10, 5]}'),  # 50 / 100: right at the threshold
        "[0, 0, 10, 4]",  # no tags; 40 / 100
        answered("over there"),
        answered("[10, 10, 0, 0]"),
        answered("[0, 0, 1, 1]"),
    ]
    scored, figures = task("rec")(rows, texts)
    assert [one.value for one in scored] == [1.0, 0.5, 0.4, 0.0, 0.0, None]
    assert [one.fault for one in scored[3:5]] == ["no box", "reversed box"]
    assert figures == {
        "rows": 5,
        "not_scored": 1,
        "accuracy": 2 / 5,
        "mean_iou": pytest.approx(1.9 / 5, abs=1e-15),
        "no_box": 1,
    }


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ("image", "[20, 30, 60, 90]"),
        ("seen", "[10, 15, 30, 45]"),  # half the size
        ("thousandths", "[100, 300, 300, 900]"),
        ("unit", "[0.1, 0.3, 0.3, 0.9]"),
        ("thousandths_yx", "[300, 100, 900, 300]"),
    ],
)
def test_grounding_in_every_frame(frame, said):
    """An image of 200 x 100 pixels; a family's frame, a column's and a setting's are one."""
    sizes = {"image_sizes": [(200, 100)], "seen_sizes": [(100, 50)]}
    for told in ({"model_frame": frame}, {"answer_frame": frame}, {}):
        row = box_row([20, 30, 60, 90], **sizes, **told)
        settings = {} if told else {"answer_frame": frame}
        (one,), figures = task("rec")([row], [answered(said)], **settings)
        assert one.value == pytest.approx(1.0, abs=1e-12) and figures["accuracy"] == 1.0
        np.testing.assert_allclose([*one.truth, *one.said], [[20, 30, 60, 90]] * 2, rtol=1e-12)


def test_a_solution_has_a_frame_too_and_an_unknown_size_is_not_scored():
    row = box_row([100, 300, 300, 900], image_sizes=[(200, 100)])
    (one,), _ = task("rec")([row], ["[20, 30, 60, 90]"], answer_frame="image",
                            solution_frame="thousandths")  # fmt: skip
    assert one.value == pytest.approx(1.0) and one.truth[0] == pytest.approx([20, 30, 60, 90])
    lost = box_row([1, 2, 3, 4], model_frame="seen")
    with pytest.raises(InputError, match="no row can be scored for 'rec'; the first: frame 'seen'"):
        task("rec")([lost], ["[1, 2, 3, 4]"])


def detections(boxes, labels, scores=None):
    items = [
        {"bbox_2d": box, "label": label} | ({} if scores is None else {"score": scores[i]})
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True))
    ]
    return f"```json\n{json.dumps(items)}\n```"


@pytest.mark.parametrize("confident", [True, False])
def test_detection_is_pycocotools_over_the_data_set(confident):
    rng = np.random.default_rng(5)
    samples, rows, texts = [], [], []
    for _ in range(20):
        num_gt, num_pred = int(rng.integers(1, 7)), int(rng.integers(1, 12))
        corner = rng.integers(0, 60, (num_gt, 2))
        gt = np.concatenate([corner, corner + rng.integers(4, 40, (num_gt, 2))], 1)
        pred = gt[rng.integers(0, num_gt, num_pred)] + rng.integers(-2, 3, (num_pred, 4))
        gt_labels = rng.integers(1, 4, num_gt).tolist()
        labels = rng.integers(1, 5, num_pred).tolist()
        scores = rng.random(num_pred).round(2).tolist() if confident else [1.0] * num_pred
        samples.append((pred.astype(float).tolist(), labels, scores, gt.astype(float).tolist(),
                        gt_labels))  # fmt: skip
        rows.append({"solution": detections(gt.tolist(), map(str, gt_labels))})
        texts.append(answered(detections(pred.tolist(), map(str, labels),
                                         scores if confident else None)))  # fmt: skip
    _, figures = task("detection")(rows, texts)
    want = coco_stats(*samples)
    got = [figures[name] for name in ("mAP", "AP50", "AP75")]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
    assert 0.02 < got[0] < got[1] < 0.95
    assert figures["unknown_labels"] == sum(label == 4 for s in samples for label in s[1])


def test_detection_by_hand():
    truth = {"solution": detections([[0, 0, 10, 10]], ["a"])}
    rows = [truth, truth, {"solution": "None"}, {"solution": "broken"}]
    texts = [
        answered(detections([[0, 0, 10, 10]], ["a"], [0.5])),
        answered("no JSON"),
        answered(detections([[5, 5, 9, 9], [0, 0, 1, 1]], ["a", "b"], [0.9, 0.1])),
        answered("None"),
    ]
    scored, figures = task("detection")(rows, texts)
    assert [one.value for one in scored] == [pytest.approx(1.0), 0.0, 0.0, None]
    assert scored[1].fault == "bad_json" and "solution" in scored[3].fault
    # a false positive above the one hit of two: precision 1/2 up to recall 1/2, nothing beyond
    assert figures["mAP"] == figures["AP50"] == pytest.approx(51 / 101 * 0.5, abs=1e-12)
    assert (figures["boxes"], figures["predicted"], figures["unknown_labels"]) == (2, 3, 1)
    assert (figures["rows"], figures["not_scored"], figures["unreadable"]) == (3, 1, 1)


def test_choices_and_mathematics():
    rows = [{"solution": "<answer> B </answer>"}] * 3 + [{"solution": "<answer> a car </answer>"}]
    texts = [answered("(B)"), answered("B. the second"), answered("C"), answered("B")]
    scored, figures = task("choice")(rows, texts)
    assert [one.value for one in scored] == [1.0, 1.0, 0.0, None]
    assert figures == {"rows": 3, "not_scored": 1, "accuracy": 2 / 3}
    rows = [{"solution": "<answer> 1/2 </answer>"}, {"solution": "<answer> 3 </answer>"}]
    _, figures = task("math")(rows, [answered("0.5"), answered("4")])
    assert figures["accuracy"] == 0.5


def test_any_reward_is_a_task_and_another_name_is_refused():
    _, figures = task("vlm_r1/format")([{}, {}], [answered("x"), "x"])
    assert figures == {"rows": 2, "not_scored": 0, "mean": 0.5}
    with pytest.raises(InputError, match="task: expected one of rec, detection, .* got 'ocr'"):
        task("ocr")
    with pytest.raises(InputError, match="no row can be scored for 'choice'"):
        task("choice")([{"solution": "<answer>a car</answer>"}], ["B"])


# An image of 200 x 100 pixels that the model saw as 100 x 50; the solution [20, 30, 60, 90] is
# 40 x 60 = 2400 pixels. What each script makes of an answer: the box it extracts, its overlap.
WHOLE = ([20, 30, 60, 90], 1.0)
LOST = ([0, 0, 0, 0], 0.0)
SCRIPTED = {
    "test_rec_r1": {
        answered('{"bbox_2d": [10, 15, 30, 45]}'): WHOLE,
        # the last box inside the braces, of the first answer
        answered('{"a": [1, 2, 3, 4], "b": [10, 15, 30, 45]}') + answered("{[1, 1, 1, 1]}"): WHOLE,
        answered("[10, 15, 30, 45]"): LOST,  # no braces
        answered("{[10.0, 15.0, 30.0, 45.0]}"): LOST,  # no integers
        '{"bbox_2d": [10, 15, 30, 45]}': LOST,  # no answer
        # half of it: 20 x 60 pixels of intersection
        answered("{[10, 15, 20, 45]}"): ([20, 30, 40, 90], 0.5),
        # one pixel wide: x1 < x2 - 1 fails, so no intersection at all
        answered("{[10, 15, 10, 45]}"): ([20, 30, 20, 90], 0.0),
    },
    "test_rec_r1_internvl": {
        answered("[20, 30, 60, 90] or [1, 2, 3, 4]"): WHOLE,  # the first box, as it stands
        answered("{[10, 15, 30, 45]}"): ([10, 15, 30, 45], 150 / 2850),
        "[20, 30, 60, 90]": LOST,
    },
    "test_rec_baseline": {
        "at [ 10.0, 15, 30 ,45.]": LOST,  # a digit must follow the point
        "at [ 10.0, 15, 30.0 ,45]": WHOLE,
        answered("[1, 2, 3] [10, 15, 30, 45] [1, 2, 3, 4]"): WHOLE,
        "[-10, 15, 30, 45]": ([-20, 30, 60, 90], 2400 / 4800),
    },
    "test_od_r1": {
        detections([[20, 30, 60, 90], [1, 2, 3, 4]], ["a", "b"]): WHOLE,  # the first item
        detections([], []): LOST,
        "```json\n{}\n```": LOST,
        "[20, 30, 60, 90]": LOST,
    },
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_vlm_r1_scripts_by_hand(name):
    for text, (box, overlap) in SCRIPTED[name].items():
        got = SCRIPTS[name](text, [20, 30, 60, 90], (200, 100), (100, 50))
        assert got == (pytest.approx(box), pytest.approx(overlap, abs=1e-15)), text
    row = box_row([20, 30, 60, 90], image_sizes=[(200, 100)], seen_sizes=[(100, 50)])
    _, figures = task(f"vlm_r1/{name}")([row] * len(SCRIPTED[name]), list(SCRIPTED[name]))
    right = sum(overlap > 0.5 for _, overlap in SCRIPTED[name].values())
    assert figures["accuracy"] == right / len(SCRIPTED[name])


def test_what_a_script_would_stop_at_counts_nowhere():
    rows = [box_row([5, 5, 5, 5]), box_row([0, 0, 9, 9])]
    scored, figures = TASKS["vlm_r1/test_od_r1"](rows, ["", detections([[0, 0, 9, 9]], ["a"])])
    assert scored[0].value is None and "divi" in scored[0].fault and figures["rows"] == 1
    scored, _ = TASKS["vlm_r1/test_od_r1"](rows[1:] * 2, [
        detections([["a"]], ["x"]), detections([[0, 0, 9, 9]], ["a"])])  # fmt: skip
    assert "the script stops" in scored[0].fault


def test_an_answer_file_keeps_what_was_answered_and_refuses_other_settings(tmp_path):
    path = tmp_path / "a" / "answers.jsonl"
    settings = {"model": "m", "max_new_tokens": 4}
    whole = AnswerFile(path, settings)
    whole.add({0: Answer("a", 1, True, {"model_frame": "seen"}), 1: Answer("é", 4, False)})
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"row": 2, "te')  # killed while it was written
    again = AnswerFile(path, settings)
    assert path.read_bytes() == before and again.answers == whole.answers
    again.add({1: Answer("other", 1, True), 2: Answer("c", 1, True)})
    assert [orjson.loads(line)["row"] for line in path.read_bytes().splitlines()[1:]] == [0, 1, 2]
    with pytest.raises(InputError, match="out: .* another max_new_tokens: 4 there, 8 now"):
        AnswerFile(path, settings | {"max_new_tokens": 8})
    path.write_bytes(before[:10])
    assert AnswerFile(path, settings).answers == {} and AnswerFile(path, settings).answers == {}
    path.write_text("[]\n")
    with pytest.raises(InputError, match="is not a file of answers"):
        AnswerFile(path, settings)
