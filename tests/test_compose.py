# SPDX-License-Identifier: Apache-2.0
"""Rewards made of rewards."""

import math

import pytest

from fastgrpo.errors import InputError
from fastgrpo.rewards.core import compose
from fastgrpo.rewards.core.schedule import Schedule


class State:
    def __init__(self, global_step, max_steps):
        self.global_step, self.max_steps = global_step, max_steps


def given(name="given", values="values"):
    """A reward that returns a data column, with a record of what it was handed."""

    def reward(prompts, completions, **columns):
        reward.seen = columns
        return columns[values]

    reward.__name__, reward.columns = name, (values,)
    return reward


def call(reward, count, **columns):
    chat = [[{"role": "assistant", "content": c}] for c in columns.pop("texts", ["x"] * count)]
    return reward(prompts=["q"] * count, completions=chat, **columns)


def test_scheduled_weight_follows_training_and_keeps_none():
    reward = compose.Scheduled(given(), Schedule("linear", start=1.0, end=0.0))
    assert call(reward, 2, values=[2.0, None], trainer_state=State(5, 10)) == [1.0, None]
    assert call(reward, 2, values=[2.0, 1.0]) == [2.0, 1.0]
    assert reward.columns == ("values",)


def test_gated_pays_the_parts_only_through_the_gate():
    reward = compose.Gated(
        given(values="gate"), [given(values="a"), given(values="b")], [0.7, 0.2], gate_weight=0.1
    )
    columns = dict(gate=[1.0, 0.0, None, 1.0], a=[0.5, 1.0, 1.0, None], b=[1.0, 1.0, 1.0, 1.0])
    assert call(reward, 4, **columns) == [pytest.approx(0.65), 0.0, None, None]
    with pytest.raises(InputError, match="weights"):
        compose.Gated(given(), [given()], [1.0, 2.0])


def test_annotated_fills_a_column_for_the_whole_batch():
    inner = given(values="judge_output")
    calls = []

    class Judge:
        def prefetch(self, prompts, completions, **columns):
            calls.append("prefetch")

        def replies(self, prompts, completions, **columns):
            calls.append(len(completions))
            return list(range(len(completions)))

    reward = compose.Annotated(inner, "judge_output", Judge().replies)
    reward.prefetch(["q"], ["x"])
    assert call(reward, 3) == [0, 1, 2] and calls == ["prefetch", 3]
    assert reward.columns == ()


@pytest.mark.parametrize("kind", ["par", "centered", "tanh", "arctan", "polynomial"])
def test_relative_rewards_of_equal_references_are_neutral(kind):
    reward = compose.Relative(given(), kind)
    neutral, none = call(reward, 2, values=[1.5, None], reference_rewards=[[1.5, 1.5]] * 2)
    assert none is None
    expected = 0.5 if kind in ("par", "polynomial") else 0.0
    assert neutral == pytest.approx(expected, abs=1e-6)
    better, _ = call(reward, 2, values=[2.0, None], reference_rewards=[[1.5, 1.5]] * 2)
    assert better > neutral
    assert "reference_rewards" in reward.columns
    with pytest.raises(InputError, match="kind"):
        compose.Relative(given(), "cubic")


def test_running_shaper_keeps_its_statistics_between_batches():
    reward = compose.Running(given(), "minmax")
    assert call(reward, 2, values=[0.0, 10.0]) == [0.0, 1.0]
    assert call(reward, 2, values=[5.0, None]) == [0.5, None]


def test_majority_vote_stays_inside_groups():
    reward = compose.MajorityVote(lambda text: text or None, group_size=3)
    texts = ["a", "a", "b", "c", "d", "d"]
    assert call(reward, 6, texts=texts) == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    with pytest.raises(InputError, match="whole groups"):
        call(reward, 2)


def test_cross_vote_joins_phrasings_by_question():
    reward = compose.CrossVote(lambda text: text or None)
    got = call(
        reward, 5, texts=["1", "2", "2", "2", "9"], question_id=["a"] * 4 + ["b"],
        phrasing=[0, 0, 1, 1, 0],
    )  # fmt: skip
    assert got == [0.0, 1.0, 0.0, 0.0, None]


def test_trust_scores_whole_groups_and_leaves_out_unscored_rows():
    reward = compose.Trust(given(values="o"), given(values="t"), group_size=2, total=100)
    got = call(
        reward, 4, o=[1.0, 0.0, 1.0, None], t=[0.2, 0.8, 0.5, 0.5], trainer_state=State(0, 10)
    )  # fmt: skip
    gamma = math.exp(0.2 - 0.8)
    assert got[:3] == pytest.approx([1 + 0.06 * gamma, 0.24 * gamma, 1.15]) and got[3] is None


def test_step_refined_adds_what_clip_and_delta_leave():
    reward = compose.StepRefined(
        given(), lambda text, row: row["steps"], coefficient=2.0, eta=0.5, delta=True
    )
    columns = dict(values=[1.0, None], steps=[[0.2, 0.9, 0.0], [0.0]])
    first, second = call(reward, 2, **columns)
    # clipped: [-0.3, 0, -0.5]; delta: [-0.3 - 0, 0, 0]
    assert first == pytest.approx(1.0 - 0.6) and second is None


def test_parts_are_bound_and_prefetched_through_every_level():
    events = []

    class Part:
        __name__, columns = "part", ()

        def prefetch(self, prompts, completions, **columns):
            events.append("prefetch")

        def bind(self, trainer):
            events.append(trainer)

        def __call__(self, prompts, completions, **columns):
            return [1.0] * len(completions)

    reward = compose.Scheduled(compose.Running(Part()), Schedule("constant", start=1.0))
    reward.prefetch(["q"], ["x"])
    reward.bind("trainer")
    assert events == ["prefetch", "trainer"]
