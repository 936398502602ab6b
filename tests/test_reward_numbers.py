# SPDX-License-Identifier: Apache-2.0
"""How rewards read a number a data file writes."""

import json

import pytest

import fastgrpo as fg
from fastgrpo.report.pictures import shapes_of
from fastgrpo.rewards.read.boxes import first_box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[1e-05, 2E+1, 3.5e1, 40]", [1e-05, 20.0, 35.0, 40.0]),
        (json.dumps([0.00001, 0.5, 0.75, 1.0]), [1e-05, 0.5, 0.75, 1.0]),
        ("[1e999, 2, 3, 4] [5, 6, 7, 8]", [5.0, 6.0, 7.0, 8.0]),  # beyond a float: no number
        ("[e, 2, 3, 4]", None),
        ("[1e, 2, 3, 4]", None),
    ],
)
def test_scientific_notation_is_a_number(text, box):
    assert first_box(text) == box


def test_a_solution_in_scientific_notation_is_scored():
    solution = "<answer> [1e-05, 0, 1e1, 1.0e+1] </answer>"
    completion = [[{"role": "assistant", "content": "<answer>[0, 0, 10, 20]</answer>"}]]
    (reward,) = fg.rewards.get("vlm_r1/iou")(completions=completion, solution=[solution])
    assert reward == pytest.approx(0.5, abs=1e-5)  # 10 x 10 inside 10 x 20
    assert shapes_of(solution) == [[1e-05, 0.0, 10.0, 10.0]]
