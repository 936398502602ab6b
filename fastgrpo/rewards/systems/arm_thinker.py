# SPDX-License-Identifier: Apache-2.0
"""ARM-Thinker's ladder for a judge with tools (InternLM/ARM-Thinker@96b1baf)."""

from __future__ import annotations

from typing import Any

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.tags import SPACE, pattern

MAX_VERDICT = 1024
_LAST_TURN = rf"(?i){SPACE}*<think>.*?</think>{SPACE}*<answer>.*?</answer>{SPACE}*"
_CHOICE = (
    rf"(?i)answer{SPACE}*([12]){SPACE}*is{SPACE}*(?:the{SPACE}*)?(?:slightly{SPACE}*)?"
    r"(?:better|preferred|correct)"
)
ZOOMED = "This is the zoom-in image"


@reward("arm_thinker/score", columns=("solution",), range=(0.0, 1.5),
        source="InternLM/ARM-Thinker@96b1baf")  # fmt: skip
def arm_thinker(text: str, *, solution: Any) -> float:
    """0 bad format; 0.3 wrong; 0.4 wrong with a tool tried; 1.0 right; 1.5 right with a tool used.

    The text holds all turns; the last one ("assistant" and a newline begin a turn) must be one
    think and one answer block. The verdict is "Answer 1 is better" or 2; a tool was tried when
    there is a `<tool_response>`, and used when it says "This is the zoom-in image".

    Source: InternLM/ARM-Thinker@96b1baf, `pair_rm_with_tool_reward_v8`. "upstream": the model can
    write the tool's words itself. "fixed": both must come from a `<tool_response>` before the last
    turn, the sentence inside the response.
    """
    last = last_turn(text)
    said = verdict(last, MAX_VERDICT)
    responses = text[: len(text) - len(last)].split("<tool_response>")[1:]
    used = any(ZOOMED in response.split("</tool_response>")[0] for response in responses)
    return ladder(said, solution, bool(responses), used)


@reward("arm_thinker/episode", columns=("solution", "environments"), range=(0.0, 1.5),
        source="InternLM/ARM-Thinker@96b1baf")  # fmt: skip
def episode(text: str, *, solution: Any, environments: Any) -> float:
    """The ladder of `arm_thinker/score` for a rollout in an environment.

    The text is the last turn; a tool was tried when the environment has a call, and used when one
    of them was served, so that no words of the model can stand for either.
    """
    steps = environments.steps
    said = verdict(text.strip(), MAX_VERDICT)
    return ladder(said, solution, bool(steps), any(step.ok for step in steps))


def last_turn(text: str) -> str:
    """What follows the last "assistant" line."""
    return text.split("assistant\n")[-1].strip()


def verdict(turn: str, searched: int | None) -> str | None:
    """The verdict in the last characters of a turn's answer, None for a turn in a bad format."""
    banned = pattern(r"(?i)</?tool_call>").search(turn)
    if banned or pattern(_LAST_TURN).fullmatch(turn) is None:
        return None
    opened = turn.lower().find("<answer>") + len("<answer>")
    said = turn[opened : turn.lower().rfind("</answer>")].strip()
    found = None
    for choice in pattern(_CHOICE).finditer(said[-(searched or len(said)) :]):
        found = choice.group(1)
    return said.lower() if found is None else found


def ladder(said: str | None, solution: Any, tried: bool, used: bool) -> float:
    """The rung of a verdict, with a tool tried or used."""
    if said is None:
        return 0.0
    if said == str(solution).strip().lower():
        return 1.5 if used else 1.0
    return 0.4 if tried else 0.3
