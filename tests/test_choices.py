# SPDX-License-Identifier: Apache-2.0
"""Which options an answer chooses."""

import pytest

from fastgrpo import rewards
from fastgrpo.rewards.read.choices import choices, read_options, same_choice

OPTIONS = {"A": "a cat", "B": "A red car", "C": "vitamin C", "D": "I am not sure"}


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        # alone
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("[b]", "B"), ("B.", "B"), ("B。", "B"),
        ("Ｂ。", "B"),
        ("**B**", "B"), ("$B$", "B"), ("\\text{B}", "B"), (" B \n", "B"), ("（Ｂ）", "B"),
        # several
        ("A, C", "AC"), ("C,A", "AC"), ("A and C", "AC"), ("A/C", "AC"), ("A; C", "AC"),
        ("A C", "AC"), ("AC", "AC"), ("A、B、D", "ABD"), ("A和C", "AC"), ("(A), (C)", "AC"),
        ("A. cat\nC. dog", "AC"), ("A. cat; C. dog", "AC"),
        # as a head
        ("B. A red car", "B"), ("B) 5 V", "B"), ("(B) it is", "B"), ("B: a dog", "B"),
        ("B：红色的车", "B"), ("B、红色的车", "B"), ("B.Red car", "B"), ("B.A red car", "B"),
        ("D. 5 A", "D"), ("C. I am not sure", "C"), ("A - a dog", "A"), ("Option B: a dog", "B"),
        ("b. a red car", "B"), ("b) a red car", "B"), ("C.5", "C"), ("选项B：车", "B"),
        # after a cue, before a stop
        ("the answer is B", "B"), ("The correct option is (D) because A is dark.", "D"),
        ("答案是A、C", "AC"), ("答案：B", "B"), ("选B", "B"), ("应该选D。", "D"), ("B选项", "B"),
        ("故选：ＡＢ", "AB"), ("B is correct", "B"), ("Both A and C are correct", "AC"),
        ("A or B? I say C。", "C"), ("It is B.", "B"), ("It's (D)", "D"), ("因此是（C）", "C"),
        ("option (b)", "B"), ("Both A and B", "AB"), ("Answer: b", "B"), ("Choice (C)", "C"),
        ("Final answer: (B) A red car.", "B"), ("I think it is B", "B"), ("So: B", "B"),
        ("结果是B", "B"), ("x = C", "C"),
        # no letter
        ("A red car", ""), ("I am not sure", ""), ("I am not sure.", ""), ("a cat", ""),
        ("A 5 V battery", ""), ("vitamin C", ""), ("Plan B", ""), ("U.S. army", ""),
        ("e.g. a cat", ""), ("A.M. radio", ""), ("OK", ""), ("AM", ""), ("CA", ""), ("AA", ""),
        ("I choose a dog", ""), ("", ""), ("。", ""), ("12", ""), ("None", ""),
    ],
)  # fmt: skip
def test_letters_are_read_where_they_are_letters(text, letters):
    assert "".join(sorted(choices(text))) == letters


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("a red car", "B"), ("A red car.", "B"), ('"A RED  CAR"', "B"), ("vitamin C", "C"),
        ("I am not sure", "D"), ("B", "B"), ("E", ""), ("a dog", ""), ("B. something else", "B"),
    ],
)  # fmt: skip
def test_the_text_of_an_option_counts(text, letters):
    assert "".join(choices(text, OPTIONS)) == letters


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (["a cat", "A red car"], None),
        (["A. a cat", "B. A red car"], None),
        ({"a": "a cat", "b": "A red car", "c": None}, None),
        (None, "What is it?\nA. a cat\nB. A red car\nAnswer with a letter."),
        (None, "是什么？\nＡ：a cat\nＢ：A red car"),
        ("(A) a cat\n(B) A red car", None),
        (None, "What is it? (A) a cat (B) A red car"),
        (None, "Choose.\nOptions: A. a cat, B. A red car"),
        (None, "是什么? A、a cat B、A red car"),
    ],
)
def test_options_of_a_row(value, problem):
    assert read_options(value, problem) == {"A": "a cat", "B": "A red car"}


def test_what_is_no_list_of_options():
    for value, problem in ((None, None), ([], None), (["only one"], None), (None, "A. one line")):
        assert read_options(value, problem) is None
    assert read_options(None, "B. from the middle\nC. on") is None
    assert read_options(None, "Is A. Smith here? Ask B. Jones or A. Smith") is None
    assert read_options(None, "one option only: (A) a cat") is None


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("B. A red car", "B", True), ("B", "B. A red car", True), ("A", "B. A red car", False),
        ("A. A dog", "B. A red car", False), ("A red car", "B. A red car", True),
        ("C. I am not sure", "C", True), ("B) 5 V", "B", True), ("B、C", "A、C", False),
        ("C, A", "AC", True), ("A", "A, C", False), ("A, C", ["A", "C"], True),
        ("a dog", "B", False), ("cat", "dog", None), ("B", "<answer> B. </answer>", True),
    ],
)  # fmt: skip
def test_choices_are_compared_as_sets(said, truth, right):
    assert same_choice(said, truth) is right


@pytest.mark.parametrize(
    ("name", "column"),
    [("vlm_r1/mcq", "solution"), ("vlm_r1/accuracy", "solution"), ("vlm_r1/default", "solution"),
     ("curr_reft/stage2", "solution"), ("spatialladder/accuracy", "answer")],
)  # fmt: skip
def test_every_reward_reads_choices_alike(name, column):
    function = rewards.get(name)
    cases = [
        ("B. A red car", "B", 1.0), ("B", "B. A red car", 1.0), ("A", "B. A red car", 0.0),
        ("A. A dog", "B. A red car", 0.0), ("（Ｃ）", "C", 1.0), ("C、A", "A、C", 1.0),
        ("A", "A、C", 0.0),
    ]  # fmt: skip
    for said, truth, right in cases:
        value = function(None, [f"<answer>{said}</answer>"], **{column: [truth]})
        assert value == [right], (said, truth)


@pytest.mark.parametrize(
    ("name", "columns", "base"),
    [("vlaa_thinking/rule", {"problem_type": "mcq"}, 0.0),
     ("listener/total", {"listener_probability": 0.0}, 0.0)],
)  # fmt: skip
def test_readings_use_the_same_reader(name, columns, base):
    function = rewards.get(name)
    top = 0.5 if name == "listener/total" else 1.0
    columns = {key: [value] for key, value in columns.items()} | {"solution": ["B. A red car"]}
    columns["options"] = [["a cat", "A red car"]]
    for said, right in (("A red car", True), ("a cat", False), ("b", True), ("A", False)):
        assert function(None, [f"<answer>{said}</answer>"], **columns) == [base + top * right]


def test_options_in_the_question_decide():
    columns = {"solution": ["C"], "problem": ["Which?\nA. iron\nB. zinc\nC. vitamin C"]}
    function = rewards.get("vlm_r1/mcq")
    assert function(None, ["<answer>Vitamin C</answer>"], **columns) == [1.0]
    assert function(None, ["<answer>zinc</answer>"], **columns) == [0.0]
    assert function(None, ["<answer>D</answer>"], **columns) == [0.0]
    assert function(None, ["<answer>C</answer>"], solution=["no letter"]) == [None]


def test_a_solution_with_digits_is_no_choice_and_text_is_compared_as_text():
    function = rewards.get("vlm_r1/default")
    assert function(None, ["<answer>12</answer>"], solution=["12"]) == [1.0]
    (value,) = function(None, ["<answer>a red car</answer>"], solution=["A red car."])
    assert value == 1.0
    (value,) = function(None, ["<answer>B</answer>"], solution=["vitamin B."])
    assert value < 0.5  # the ratio of the texts, not the letter
