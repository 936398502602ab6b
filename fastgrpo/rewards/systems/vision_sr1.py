# SPDX-License-Identifier: Apache-2.0
"""Vision-SR1's self-reward (zli12321/Vision-SR1@4480e08)."""

from __future__ import annotations

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.faults import Unscorable
from fastgrpo.rewards.read.mathematics import MAX_BOXED, boxed, grade_answer
from fastgrpo.rewards.read.tags import SPACE, pattern

SOURCE = "zli12321/Vision-SR1@4480e08"
MAX_TEXT = 1 << 16
_FORMAT = (
    rf"{SPACE}*<description>.*?</description>{SPACE}*<think>.*?</think>{SPACE}*"
    rf"\\boxed\{{.*?\}}{SPACE}*"
)


def tight_tags(text: str) -> str:
    """Without the blanks around <, > and /."""
    for char in "<>/":
        first, *rest = text.split(char)
        if rest:
            middle = [part.strip() for part in rest[:-1]]
            text = char.join([first.rstrip(), *middle, rest[-1].lstrip()])
    return text


def boxed_answer(text: str) -> str:
    """mathruler's extraction: the text "None" when nothing is boxed."""
    start = text.rfind("\\boxed{")
    inner = boxed(text[start : start + MAX_BOXED]) if start >= 0 else None
    return "None" if inner is None else inner.strip()


def described_truth(*, solution, **columns) -> str:
    """Description, thought and the solution in a box."""
    return f"<description>d</description><think>t</think>\\boxed{{{solution}}}"


@reward("vision_sr1/format", source=SOURCE)
def format_reward(text: str) -> float:
    r"""1 for description, think and a final `\boxed{}`, blanks between them allowed.

    Source: zli12321/Vision-SR1@4480e08, see_think_selfReward `format_reward`; blanks around
    tags are removed first, as there. "fixed": a text beyond 65,536 characters gives 0.
    """
    if len(text) > MAX_TEXT:
        raise Unscorable("text_too_long")
    return blocks(text)


def blocks(text: str) -> float:
    """1 when the tightened text is the three blocks."""
    return float(pattern(_FORMAT).fullmatch(tight_tags(text)) is not None)


@reward("vision_sr1/accuracy", columns=("solution",), verifies=True, source=SOURCE,
        truth=described_truth)  # fmt: skip
def accuracy(text: str, *, solution: str) -> float:
    r"""1 when the last `\boxed{}` equals the solution by mathruler's rules (`grade_answer`).

    Source: zli12321/Vision-SR1@4480e08, `accuracy_reward`. "upstream": without a box the answer is
    the text "None". "fixed": then it is wrong.
    """
    text = text[-MAX_TEXT:]
    return _graded(boxed_answer(tight_tags(text)), text, solution)


def _graded(said: str, text: str, solution: str) -> float:
    if said == "None" and "\\boxed{None}" not in text:
        return 0.0
    return float(grade_answer(said, str(solution)))


@reward("vision_sr1/description_accuracy", columns=("solution", "description_answer"),
        verifies=True, source=SOURCE)  # fmt: skip
def description_accuracy(text: str, *, solution: str, description_answer: str) -> float:
    """Accuracy of `description_answer`, a second pass that saw the model's description only.

    Source: zli12321/Vision-SR1@4480e08. Modes as `vision_sr1/accuracy`.
    """
    return _graded(boxed_answer(description_answer), description_answer, solution)


@reward(
    "vision_sr1/total",
    columns=("solution", "description_answer"),
    range=(0.0, 2.0),
    verifies=True,
    source=SOURCE,
)
def total(
    text: str, *, solution: str, description_answer: str, format_weight: float = 0.1
) -> float:
    """(1 - w) accuracy + w format + description accuracy, w = 0.1.

    Source: zli12321/Vision-SR1@4480e08, see_think_selfReward `compute_score`.
    """
    right = accuracy(text, solution=solution)
    seen = description_accuracy(text, solution=solution, description_answer=description_answer)
    return (1 - format_weight) * right + format_weight * format_reward(text) + seen
