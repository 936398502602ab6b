# SPDX-License-Identifier: Apache-2.0
"""Our rewards in the forms of verl, EasyR1, ms-swift, OpenRLHF and VLM-R1."""

import pytest
import torch

from fastgrpo import InputError, rewards
from fastgrpo.integrations.reward_adapters import (
    as_easyr1,
    as_openrlhf,
    as_swift_orm,
    as_verl,
    as_vlm_r1,
)

BOX = "<think>there</think><answer>[0, 0, 10, 10]</answer>"
HALF = "<think>there</think><answer>[0, 0, 10, 5]</answer>"
NOTHING = "I do not know"
TRUTH = "<answer> [0, 0, 10, 10] </answer>"
TEXTS, SCORES = [BOX, HALF, NOTHING], [1.0, 0.5, 0.0]


@pytest.fixture
def iou():
    return rewards.get("vlm_r1/iou")


def unscored(prompts, completions, **columns):
    """Scores only what has an answer tag; remembers the columns."""
    unscored.columns = columns
    return [1.0 if "<answer>" in c[0]["content"] else None for c in completions]


def test_verl_scores_one_response(iou):
    compute_score = as_verl(iou)
    got = [compute_score("refcoco", text, TRUTH, {"index": 3}) for text in TEXTS]
    assert got == pytest.approx(SCORES) and all(type(score) is float for score in got)
    assert compute_score(data_source="refcoco", solution_str=BOX, ground_truth=TRUTH) == 1.0


def test_verl_passes_extra_info_as_columns():
    compute_score = as_verl(unscored, column="answer", missing=-1.0)
    assert compute_score("set", NOTHING, 7, {"height": 30}) == -1.0
    assert unscored.columns == {"height": [30], "data_source": ["set"], "answer": [7]}


def test_easyr1_scores_a_batch(iou):
    inputs = [
        {"response": text, "response_length": len(text), "ground_truth": TRUTH} for text in TEXTS
    ]
    got = as_easyr1(iou)(inputs)
    assert [row["overall"] for row in got] == pytest.approx(SCORES)
    assert as_easyr1(unscored, missing=0.25)(inputs)[2] == {"overall": 0.25}


def test_swift_orm_is_a_class_that_passes_none_on(iou):
    orm = as_swift_orm(iou)
    assert isinstance(orm, type)
    assert orm()(TEXTS, solution=[TRUTH] * 3) == pytest.approx(SCORES)
    assert as_swift_orm(unscored)(args=None)(TEXTS) == [1.0, 1.0, None]
    assert as_swift_orm(unscored, missing=0.0)()(TEXTS) == [1.0, 1.0, 0.0]


def test_openrlhf_takes_the_response_out_of_the_query(iou):
    prompts = ["find the <answer>: ", "p", ""]
    queries = [prompt + text for prompt, text in zip(prompts, TEXTS, strict=True)]
    got = as_openrlhf(iou)(queries, prompts, [TRUTH] * 3)
    torch.testing.assert_close(got["rewards"], torch.tensor(SCORES))
    torch.testing.assert_close(got["scores"], torch.tensor(SCORES))
    with pytest.raises(InputError, match=r"queries\[1\]"):
        as_openrlhf(iou)(["a b", "c"], ["a", "x"], [TRUTH] * 2)


def test_vlm_r1_gets_numbers_only(iou):
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    columns = dict(prompts=[[]] * 3, problem=["find"] * 3, solution=[TRUTH] * 3)
    assert as_vlm_r1(iou)(completions=completions, **columns) == pytest.approx(SCORES)
    assert as_vlm_r1(unscored)(completions=completions) == [1.0, 1.0, 0.0]


def test_a_reward_of_the_wrong_length_is_refused():
    with pytest.raises(InputError, match="2 scores for 1"):
        as_verl(lambda completions, **columns: [1.0, 2.0])("set", BOX, TRUTH)


def test_adapters_keep_the_name_frameworks_log(iou):
    for adapter in (as_verl, as_easyr1, as_openrlhf, as_vlm_r1, as_swift_orm):
        assert adapter(iou).__name__ == "vlm_r1_iou"
