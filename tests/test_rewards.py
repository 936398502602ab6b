# SPDX-License-Identifier: Apache-2.0
"""The registry's contract, and what "fixed" promises where the published code does not."""

import inspect
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
from published import fenced, one
from reward_rows import BOXES, row

import fastgrpo as fg
from fastgrpo import rewards
from fastgrpo.errors import InputError
from fastgrpo.reference.average_precision import COCO, RECALLS
from fastgrpo.rewards.geometry.overlap import iou
from fastgrpo.rewards.read.boxes import first_box
from fastgrpo.rewards.read.words import clean_text, ngram_repetition
from fastgrpo.rewards.systems import v_triune
from fastgrpo.rewards.systems.vlm_r1_answers_upstream import extract_choice

CAT, DOG = BOXES
SOLUTION = f"<answer>{fenced(BOXES)}</answer>"


def said(items) -> str:
    return f"<think>t</think><answer>{fenced(items)}</answer>"


def test_every_reward_is_documented_and_named_for_trl():
    for name in rewards.names():
        function = rewards.get(name)
        assert function.name == name and function.__name__ == name.replace("/", "_")
        assert len(function.__doc__.splitlines()[0]) > 20, name
        assert function.source
        low, high = function.range
        assert low < high
        assert not inspect.iscoroutinefunction(function)


def test_trl_calls_it_with_whatever_columns_there_are():
    function = fg.rewards.get("vlm_r1/iou")
    values = function(
        prompts=[None],
        completions=[[{"role": "assistant", "content": "<answer>[1, 2, 3, 4]</answer>"}]],
        completion_ids=[[1, 2]],
        solution=[[1, 2, 3, 5]],
        unrelated=["x"],
        trainer_state=SimpleNamespace(global_step=1, max_steps=2),
        log_extra=None,
    )
    assert values == [pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rewards.get("vlm_r1/iuo"), "no reward"),
        (lambda: rewards.get("vlm_r1/iou", compat="old"), "compat"),
        (lambda: rewards.get("vlm_r1/iou", famly="qwen"), "famly"),
        (
            lambda: rewards.get("vlm_r1/iou", family="x")(None, ["a"], solution=[[1, 2, 3, 4]]),
            "family",
        ),
        (lambda: rewards.get("vlm_r1/iou")(None, ["a"]), "'solution' is missing"),
        (lambda: rewards.get("vlm_r1/iou")(None, ["a"], solution=[]), "one value per completion"),
        (lambda: rewards.get("vlm_r1/iou")(None, None), "completions"),
        (
            lambda: one("v_triune/detection", said(BOXES), "fixed", solution=SOLUTION),
            "trainer_state",
        ),
        (lambda: one("vlm_r1/length", "a", "fixed"), "completion_ids"),
    ],
)
def test_wrong_calls_name_the_argument(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_what_cannot_be_scored_is_counted_with_its_reason():
    rewards.reset_stats()
    function = rewards.get("vlm_r1/od_ap")
    texts = ["no answer", said([CAT])[:-20], said(BOXES), 7, "x" * (1 << 20 | 1)]
    assert function(None, texts, solution=[SOLUTION] * 5) == [0.0, 0.0, 1.0, 0.0, 0.0]
    counts = rewards.stats()["vlm_r1/od_ap"]
    assert counts == {"no_answer": 2, "not_text": 1, "too_long": 1}
    rewards.reset_stats()
    assert rewards.stats() == {}


def test_a_bad_solution_leaves_the_row_out():
    for bad in ("<answer>```json\n[{]\n```</answer>", [{"bbox_2d": [1, 2, 3, 4]}], 3):
        assert one("vlm_r1/od_ap", said(BOXES), "fixed", solution=bad) is None
    with pytest.raises(ValueError, match="Expecting"):
        one("vlm_r1/od_ap", said(BOXES), solution="<answer>```json\n[{]\n```</answer>")


def test_a_missing_optional_value_means_its_default():
    function = rewards.get("spatialladder/accuracy")
    columns = {"answer": ["A", "2.0"], "accu_reward_method": [None, "na"]}
    assert function(None, ["A", "2.0"], **columns) == [1.0, 1.0]
    function = rewards.get("vlm_r1/accuracy")
    columns = {"solution": ["B", SOLUTION], "accu_reward_method": [None, "od_ap"]}
    assert function(None, ["<answer>B</answer>", said(BOXES)], **columns) == [1.0, 1.0]


# Boxes


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[1, 2, 3, 4]", [1, 2, 3, 4]),
        ("a [1] [[1.5,-2,3e, 4] [+1,2.25,\n3, 4.]", [1, 2.25, 3, 4]),
        ("[[10, 20, 30, 40], [1, 2, 3, 4]]", [10, 20, 30, 40]),
        ("[1, 2, 3]", None),
        ("[nan, 1, 2, 3] [1_0, 1, 2, 3] [inf,1,2,3] [١,1,2,3]", None),
        ("]" * 10, None),
        ("", None),
    ],
)
def test_first_box(text, box):
    assert first_box(text) == box


def test_qwen_boxes_are_scaled_to_the_image():
    columns = {"solution": [0, 0, 100, 100], "image_size": (200, 100), "image_grid_thw": (1, 5, 10)}
    half = "<answer>[0, 0, 70, 70]</answer>"  # the model saw 140 x 70 pixels
    assert one("vlm_r1/iou", half, "fixed", **columns) == pytest.approx(1.0)
    assert one("vlm_r1/iou_internvl", half, "fixed", **columns) == pytest.approx(0.49)


def _brute_ap(preds, gts) -> float:
    """AP of one operating point by the definition, greedy matching by search."""
    classes = {i["label"] for i in preds} | {i["label"] for i in gts}
    total = 0.0
    for label, threshold in itertools.product(classes, COCO):
        p = [i["bbox_2d"] for i in preds if i["label"] == label]
        g = [i["bbox_2d"] for i in gts if i["label"] == label]
        num_p, num_g, hits = len(p), len(g), 0
        while p and g:
            best = max(((iou(a, b), i, j) for i, a in enumerate(p)
                        for j, b in enumerate(g)), key=lambda t: t[0])  # fmt: skip
            if best[0] < threshold:
                break
            hits += 1
            del p[best[1]], g[best[2]]
        if hits:
            recalls = sum(r <= hits / num_g for r in RECALLS) / len(RECALLS)
            total += hits / num_p * recalls
    return total / len(classes) / len(COCO)


def _random_items(rng, count):
    for _ in range(count):
        x, y = rng.randrange(60), rng.randrange(60)
        box = [x, y, x + rng.randrange(1, 40), y + rng.randrange(1, 40)]
        yield {"bbox_2d": box, "label": rng.choice(["cat", "dog", "bird"])}


def test_fixed_ap_is_the_operating_point():
    rng = random.Random(3)
    for _ in range(60):
        gts = list(_random_items(rng, rng.randrange(1, 6)))
        preds = [dict(rng.choice(gts)) for _ in range(2)] + list(_random_items(rng, 3))
        for item in preds:
            item["bbox_2d"] = [v + rng.randrange(-2, 3) for v in item["bbox_2d"]]
        preds = [i for i in preds if i["bbox_2d"][0] <= i["bbox_2d"][2]
                 and i["bbox_2d"][1] <= i["bbox_2d"][3]]  # fmt: skip
        value = one(
            "vlm_r1/od_ap", said(preds), "fixed", solution=f"<answer>{fenced(gts)}</answer>"
        )
        assert value == pytest.approx(_brute_ap(preds, gts), abs=1e-12)


@pytest.mark.parametrize("name", ["vlm_r1/od_ap", "vlm_r1/od_length", "vlm_r1/weighted_sum"])
def test_fixed_detection_is_ordered_by_quality(name):
    def value(items):
        return one(name, said(items), "fixed", solution=SOLUTION)

    false = {"bbox_2d": [400, 400, 450, 450], "label": "cat"}
    unknown = {"bbox_2d": [5, 5, 50, 50], "label": "unicorn"}
    assert value([CAT, DOG]) == 1.0
    assert value([DOG, CAT]) == 1.0
    assert value([false, CAT, DOG]) == value([CAT, DOG, false]) < 1
    assert value([CAT, DOG, CAT, DOG]) < value([CAT, DOG, CAT]) < 1
    assert value([CAT, DOG, unknown]) < 1
    assert value([CAT]) < 1
    swapped = [{**CAT, "label": "dog"}, {**DOG, "label": "cat"}]
    assert value(swapped) == 0.0
    bare = f"<answer>{fenced([CAT, DOG])[8:-4]}</answer>"
    assert one(name, bare, "fixed", solution=SOLUTION) == 1.0
    assert one(name, "<answer>None</answer>", "fixed", solution="None") == 1.0
    assert one(name, "<answer>I see no cat</answer>", "fixed", solution="None") == 0.0


def test_rows_of_a_batch_do_not_meet():
    texts = [said([CAT]), said([]), said([DOG, CAT]), said([DOG])]
    solutions = [fenced([CAT]), fenced([CAT]), fenced([CAT, DOG]), fenced([CAT])]
    function = rewards.get("vlm_r1/weighted_sum")
    assert function(None, texts, solution=solutions) == [1.0, 0.0, 1.0, 0.0]
    assert function(None, [], solution=[]) == []


# Schedules


@pytest.mark.parametrize(
    ("step", "epsilon"), [(0, 0.85), (10, 0.85), (11, 0.95), (25, 0.95), (26, 0.99), (100, 0.99)]
)
def test_v_triune_threshold_follows_the_trainer(step, epsilon):
    assert v_triune.dynamic_threshold(step, 100) == epsilon
    near = said([{"bbox_2d": [10, 10, 100, 110], "label": "cat"}, DOG]).replace(">t<", ">\nt\n<")
    function = rewards.get("v_triune/detection")
    state = SimpleNamespace(global_step=step, max_steps=100)
    columns = {"solution": [f"<answer>{[CAT, DOG]}</answer>"], "trainer_state": state}
    [value] = function(None, [near.replace("```json", "").replace("```", "")], **columns)
    # IoU 0.9 of the first box counts while the threshold is 0.85; the second is exact.
    whole = 0.7 * (0.9 + 1) / 2 + 0.3 if epsilon == 0.85 else 0.7 / 2 + 0.3 / 2
    assert value == pytest.approx(whole)


def test_vision_r1_stages_follow_the_trainer():
    function = rewards.get("vision_r1/precision", adaptive=True)
    columns = {"solution": [[["cat", [0, 0, 100, 100]]]]}
    text = ['[{"bbox_2d": [0, 0, 100, 80], "label": "cat"}]']  # GIoU 0.8
    for step, value in ((0, 1.0), (1499, 1.0), (1500, 0.8)):
        state = SimpleNamespace(global_step=step, max_steps=3000)
        assert function(None, text, trainer_state=state, **columns) == [pytest.approx(value)]
    assert rewards.get("vision_r1/precision")(None, text, **columns) == [pytest.approx(0.8)]


# Text


def test_answers_of_a_batch_are_verified_together():
    texts = [f"<answer>\\frac{{{n}}}{{7}}</answer>" for n in range(1, 40)]
    solutions = [f"${n}/7$" for n in range(1, 40)]
    solutions[3] = "$1/3$"
    for name in ("vlm_r1/math", "vlm_r1/default"):
        values = rewards.get(name)(None, texts, solution=solutions)
        assert [v == 1.0 for v in values] == [i != 3 for i in range(39)]


def test_clean_text_and_choices():
    assert clean_text("<answer>x</answer><answer> A\nb \r\nC. </answer>") == "a b c"
    assert extract_choice("the answer is B.") == "B"
    assert extract_choice("") is None
    assert one("vlm_r1/mcq", "<answer>(B)</answer>", "fixed", solution="B") == 1.0
    assert one("vlm_r1/mcq", "<answer>A or B? I say C。</answer>", "fixed", solution="C") == 1.0
    assert one("vlm_r1/mcq", "<answer>a cat</answer>", "fixed", solution="A") == 0.0


@pytest.mark.parametrize("size", [1, 2, 6])
def test_ngram_repetition_counts_exactly(size):
    rng = np.random.default_rng(size)
    for length in (0, 1, size, 50):
        words = [str(w) for w in rng.integers(0, 4, length)]
        grams = [tuple(words[i : i + size]) for i in range(length - size + 1)]
        expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
        assert ngram_repetition(words, size) == pytest.approx(expected)


def test_rows_for_tests_cover_what_each_reward_needs():
    for name in rewards.names():
        assert set(rewards.get(name).columns) <= set(row(name)), name
