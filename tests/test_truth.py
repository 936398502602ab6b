# SPDX-License-Identifier: Apache-2.0
"""Rewards asked about their own truth, and what a run does with the answer."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from reward_rows import SETTINGS, row

from fastgrpo import InputError, recipes, rewards
from fastgrpo.integrations.trl.first_batches import WATCHED, FirstBatches
from fastgrpo.recipes.rewards import build_reward
from fastgrpo.rewards.core.check import check_truth, has_truth, parts_of
from fastgrpo.rewards.core.compose import Scheduled
from fastgrpo.rewards.core.schedule import Schedule
from fastgrpo.rewards.read.boxes import first_box

MADE = [name for name in rewards.names() if has_truth(rewards.get(name))]
ONE_TURN = [name for name in recipes.names() if recipes.load(name).environment is None]
STATE = SimpleNamespace(global_step=1, max_steps=100)
SIZES = {"image_sizes": [(400, 400)], "seen_sizes": [(448, 420)]}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("frame", [None, "seen", "thousandths", "unit"])
def test_every_reward_pays_the_answer_made_from_its_solution(name, frame):
    function = rewards.get(name, **SETTINGS.get(name, {}))
    columns = {key: [value] for key, value in row(name).items()}
    columns |= {key: [value] for key, value in SIZES.items()} | {"model_frame": [frame]}
    if name == "affordance_r1/total":
        columns["affordance"] = ["grasp"]
    (verdict,) = check_truth(function, columns, [0], trainer_state=STATE)
    assert verdict.fault is None, verdict
    assert verdict.value == pytest.approx(function.range[1], abs=1e-6)


def test_most_rewards_with_a_solution_make_one():
    columns = {name: rewards.get(name).columns for name in rewards.names()}
    with_solution = [n for n, c in columns.items() if "solution" in c and "environments" not in c]
    assert len(MADE) > 40 and len(set(with_solution) & set(MADE)) > 0.75 * len(with_solution)
    assert not has_truth(rewards.get("vlm_r1/format"))
    assert not has_truth(rewards.get("vlm_r1/iou", compat="upstream"))


@pytest.mark.parametrize("frame", ["seen", "thousandths"])
@pytest.mark.parametrize("name", ONE_TURN)
def test_every_recipe_passes_on_its_example(name, frame, monkeypatch):
    monkeypatch.setenv("FASTGRPO_JUDGE_URL", "http://127.0.0.1:9/v1")
    recipe = recipes.load(name)
    functions = []
    for spec in recipe.rewards:
        if "reward" in spec:
            functions.append(build_reward(spec, group_size=4))
    columns = recipe.example["columns"] | SIZES | {"model_frame": frame, "prompt": "q"}
    FirstBatches().ask_truth(functions, [columns] * 4, 4, STATE)


def a_row(**columns):
    base = {"prompt": "q", "solution": json.dumps([80, 60, 160, 180]), "model_frame": "seen"}
    base["solution_frame"] = None
    return base | SIZES | columns


def test_a_frame_the_model_does_not_write_stops_the_run():
    wrong = rewards.get("vlm_r1/iou", answer_frame="unit")
    with pytest.raises(InputError, match=r"is paid 0, .* in row 0 .*'seen', read as 'unit'"):
        FirstBatches().ask_truth([wrong], [a_row()], 1, STATE)
    # a row whose prompt asks for that frame is no fault
    FirstBatches().ask_truth([wrong], [a_row(answer_frame="unit")], 1, STATE)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"solution_frame": "unit"}, "lies outside its image"),
        ({"solution": "[250, 250, 900, 750]"}, "lies outside its image"),  # these are thousandths
        ({"solution": "[0.25, 0.25, 0.9, 0.75]"}, "no coordinate above 1"),  # these are shares
    ],
)
def test_solutions_in_another_frame_than_stated_stop_the_run(columns, message, caplog):
    function = rewards.get("vlm_r1/iou")
    rows = [a_row(), a_row(**columns), a_row(**columns)]
    with pytest.raises(InputError, match=f"{message}.* in row 1 "):
        FirstBatches().ask_truth([function], rows, 1, STATE)
    FirstBatches().ask_truth([function], rows[:2], 1, STATE)  # one odd row of two is named only
    assert message in caplog.text


def test_it_asks_once_looks_into_made_rewards_and_leaves_unusable_rows_to_the_guard():
    wrong = rewards.get("vlm_r1/iou", answer_frame="unit")
    made = Scheduled(wrong, Schedule("constant", start=1.0))
    assert list(parts_of(made)) == [wrong]
    first = FirstBatches()
    with pytest.raises(InputError, match="fails its own truth"):
        first.ask_truth([made], [a_row()], 1, STATE)
    first.ask_truth([made], [a_row()], 1, STATE)
    FirstBatches().ask_truth([wrong], [a_row(solution="no box")], 1, STATE)
    FirstBatches().ask_truth([rewards.get("vlm_r1/iou")], [a_row(seen_sizes=None)], 1, STATE)


def test_rewards_without_a_truth_are_named(caplog):
    caplog.set_level(logging.INFO)

    def mine(completions, **columns):
        return [0.0] * len(completions)

    FirstBatches().ask_truth([mine, rewards.get("vlm_r1/format")], [a_row()], 1, STATE)
    assert "no answer can be made to check: mine, vlm_r1_format" in caplog.text


def test_a_reward_that_never_moves_is_named_once(caplog):
    first = FirstBatches()
    for batch in range(WATCHED + 3):
        moving = torch.tensor([0.0, float(batch)])
        still = torch.tensor([0.5, torch.nan])
        unscored = torch.tensor([torch.nan, torch.nan])
        first.watch(torch.stack([moving, still, unscored], 1), ["moving", "still", "unscored"])
    named = [record for record in caplog.records if "teaches nothing" in record.message]
    assert len(named) == 1 and "reward still was 0.5" in named[0].message


def framed_recipes():
    for name in ONE_TURN:
        recipe = recipes.load(name)
        if first_box(str(recipe.example["columns"].get("solution"))) is None:
            continue
        specs = [spec for spec in recipe.rewards if "reward" in spec]
        functions = [rewards.get(spec["reward"]) for spec in specs]
        if any(f.framed and has_truth(f) and not f.prescribed_frame for f in functions):
            yield name


@pytest.mark.parametrize("name", list(framed_recipes()))
def test_every_recipe_with_boxes_fails_on_a_frame_that_is_wrong(name):
    recipe = recipes.load(name)
    columns = recipe.example["columns"] | SIZES | {"prompt": "q"}
    right, wrong = ([], [])
    for spec in (spec for spec in recipe.rewards if "reward" in spec):
        function = build_reward(spec, group_size=4)
        params = spec.get("params", {})
        right.append(function)
        if function.framed:
            function = rewards.get(function.name, **params, answer_frame="unit")
        wrong.append(function)
    told = columns | {"model_frame": "seen", "answer_frame": None}
    FirstBatches().ask_truth(right, [told] * 4, 4, STATE)
    with pytest.raises(InputError, match="'seen', read as 'unit'"):
        FirstBatches().ask_truth(wrong, [told] * 4, 4, STATE)
    # the solution is said to be in a frame it does not fit: its boxes lie outside the image
    with pytest.raises(InputError, match="lies outside its image"):
        FirstBatches().ask_truth(right, [told | {"solution_frame": "unit"}] * 4, 4, STATE)


def test_a_family_without_a_frame_stops_the_run_until_one_is_stated():
    function, silent = rewards.get("vlm_r1/iou"), a_row(model_frame="unstated")
    with pytest.raises(InputError, match="states no frame .* answer_frame .*thousandths"):
        FirstBatches().ask_truth([function], [silent], 1, STATE)
    FirstBatches().ask_truth([function], [silent | {"answer_frame": "image"}], 1, STATE)
    stated = rewards.get("vlm_r1/iou", answer_frame="thousandths")
    FirstBatches().ask_truth([stated], [silent], 1, STATE)
    FirstBatches().ask_truth([rewards.get("vlm_r1/iou", compat="upstream")], [silent], 1, STATE)
