# SPDX-License-Identifier: Apache-2.0
"""Ten thousand random completions through every reward; batches neither mix nor reorder rows."""

import math
import random

import pytest
from reward_rows import BOXES, GROUPWISE, MATHEMATICAL, call

from fastgrpo import rewards

COUNT = 10_000
# The workers need about a millisecond per answer; these rewards see a share of the completions.
MATH_COUNT = 200
_PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<look>",
    "</look>",
    "<description>",
    "</description>",
    "<rethink>x</rethink>",
    "```json",
    "```",
    "\n",
    " ",
    "\t",
    "[",
    "]",
    "{",
    "}",
    "(1,2),(3,4)",
    "[10, 10, 110, 110]",
    "[10.5, 1e3, -2, 4]",
    "[110, 110, 10, 10]",
    '"bbox_2d": ',
    '"label": "cat"',
    '"Position": [1, 2, 3, 4]',
    "'Confidence': 0.5",
    '"point_2d": [60, 60]',
    '"rating": 3.6',
    "NaN",
    "Infinity",
    "1e999",
    "-0",
    "99999999999999999999",
    "yes",
    "no",
    "A",
    "B.",
    "C,A",
    "42",
    "\\boxed{42}",
    "\\boxed{",
    "\\frac{1}{2}",
    "$x$",
    "None",
    "猫",
    "。",
    "１２",
    "\u202e",
    "\x00",
    "\ud800",
    "\\",
    '"',
    "'",
    ",",
    ":",
    "--",
    "Route Name: Line 1\n",
    "Departure Stop: A\n",
    "Arrival Stop: D\n",
    "assistant\n",
    "<tool_response>",
    "Answer 1 is better",
    "box: [0,0,0,2,2,2]",
    "[[A]]",
    '{"POINT": [500, 500]}',
    "the answer is yes",
    "a brown dog",
]
_SKELETONS = [
    "{0}",
    "<answer>{0}</answer>",
    "<think>{1}</think><answer>{0}</answer>",
    "<think>\n{1}\n</think>\n<answer>\n{0}\n</answer>",
    "```json\n{0}\n```",
    "<think>{1}</think><answer>```json\n{0}\n```</answer>",
    "<answer>{0}</answer><answer>{1}</answer>",
]


def _completion(rng: random.Random) -> str:
    def piece() -> str:
        if rng.random() < 0.3:
            items = rng.choices(BOXES, k=rng.randrange(4))
            text = str(items) if rng.random() < 0.3 else str(items).replace("'", '"')
            cut = rng.randrange(len(text) + 1) if rng.random() < 0.2 else len(text)
            return text[:cut]
        return "".join(rng.choices(_PIECES, k=rng.randrange(12)))

    return rng.choice(_SKELETONS).format(piece(), piece())


@pytest.fixture(scope="module")
def completions() -> list[str]:
    rng = random.Random(20)
    return [_completion(rng) for _ in range(COUNT)]


@pytest.mark.parametrize("name", rewards.names())
def test_no_exception_no_nan_in_range(name, completions):
    texts = completions[:MATH_COUNT] if name in MATHEMATICAL else completions
    if name in GROUPWISE:
        texts = texts[:512]  # one group of all; groups have tens of completions
    low, high = rewards.get(name).range
    values = call(name, texts)
    assert len(values) == len(texts)
    for text, value in zip(texts, values, strict=True):
        if value is not None:
            assert isinstance(value, float) and math.isfinite(value), (text, value)
            assert low <= value <= high, (text, value)
    assert "out_of_range" not in rewards.stats().get(name, {})


@pytest.mark.parametrize("name", [n for n in rewards.names() if n not in GROUPWISE])
def test_order_and_batch_do_not_matter(name, completions):
    texts = completions[:40] if name not in MATHEMATICAL else completions[:12]
    together = call(name, texts)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    shuffled = call(name, [texts[i] for i in order])
    assert shuffled == [together[i] for i in order]
    assert [call(name, [text])[0] for text in texts] == together


@pytest.mark.parametrize("name", rewards.names())
def test_conversational_and_plain_completions_agree(name, completions):
    texts = completions[:8]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": t}]}] for t in texts]
    assert call(name, chats) == call(name, texts) == call(name, parts)
