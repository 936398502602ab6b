"""Rewards that train a judge: RM-R1, UnifiedReward-Think, ARM-Thinker."""

from __future__ import annotations

from typing import Any

from fastgrpo.rewards.registry import BadColumn, reward
from fastgrpo.rewards.text import SPACE, answer, pattern
from fastgrpo.rewards.vlm_r1 import think_then_answer

RM_R1 = "RM-R1-UIUC/RM-R1@d4c2542"
UNIFIED = "CodeGoat24/UnifiedReward@ff6f520"
ARM = "InternLM/ARM-Thinker@96b1baf"
MAX_ANSWER = 8192
MAX_VERDICT = 1024


@reward("rm_r1/answer", columns=("solution",), range=(-1.0, 1.0), source=RM_R1)
def rm_r1(text: str, *, solution: str, compat: str) -> float:
    """+1 when the verdict `<answer>[[A]]</answer>` or B is the solution's, else -1.

    The solution is "model_a" or "model_b".

    Source: RM-R1-UIUC/RM-R1@d4c2542, `answer_reward`. "upstream": only the last 80 characters are
    searched, and the other verdict must not be there. "fixed": the last verdict of the text counts
    wherever it stands; an unknown solution gives None.
    """
    verdicts = {"model_a": "<answer>[[A]]</answer>", "model_b": "<answer>[[B]]</answer>"}
    if solution not in verdicts:
        if compat == "upstream":
            raise NotImplementedError(f"label {solution!r}")
        raise BadColumn("solution is neither model_a nor model_b")
    right = verdicts[solution]
    wrong = verdicts["model_b" if solution == "model_a" else "model_a"]
    if compat == "upstream":
        end = text[-80:]
        return 1.0 if right in end and wrong not in end else -1.0
    return 1.0 if text.rfind(right) > text.rfind(wrong) else -1.0


@reward("unifiedreward_think/accuracy", columns=("solution",), source=UNIFIED)
def unified_accuracy(text: str, *, solution: str, compat: str) -> float:
    """1 when the first answer (or the whole text) is exactly the solution.

    Source: CodeGoat24/UnifiedReward@ff6f520, `accuracy_reward`. "fixed": the last answer, tags of
    the solution, case and final full stops aside.
    """
    content = answer(text, last=compat == "fixed")
    said = (text if content is None else content).strip()
    if compat == "upstream":
        return float(said == solution)
    content = answer(solution)
    truth = (solution if content is None else content).strip()
    return float(said[:MAX_ANSWER].lower().rstrip(".") == truth.lower().rstrip("."))


@reward("unifiedreward_think/format", source=UNIFIED)
def unified_format(text: str, *, compat: str) -> float:
    """1 when the text begins with `<think>...</think> <answer>...</answer>`.

    Source: CodeGoat24/UnifiedReward@ff6f520, `format_reward`. "upstream": anything may follow.
    "fixed": as `vlm_r1/format`.
    """
    if compat == "fixed":
        return float(think_then_answer(text) is not None)
    start = rf"<think>.*?</think>{SPACE}*<answer>.*?</answer>"
    return float(text.startswith("<think>") and pattern(start).match(text) is not None)


_LAST_TURN = rf"(?i){SPACE}*<think>.*?</think>{SPACE}*<answer>.*?</answer>{SPACE}*"
_CHOICE = (
    rf"(?i)answer{SPACE}*([12]){SPACE}*is{SPACE}*(?:the{SPACE}*)?(?:slightly{SPACE}*)?"
    r"(?:better|preferred|correct)"
)


@reward("arm_thinker/score", columns=("solution",), range=(0.0, 1.5), source=ARM)
def arm_thinker(text: str, *, solution: Any, compat: str) -> float:
    """0 bad format; 0.3 wrong; 0.4 wrong with a tool tried; 1.0 right; 1.5 right with a tool used.

    The text holds all turns; the last one ("assistant" and a newline begin a turn) must be one
    think and one answer block. The verdict is "Answer 1 is better" or 2; a tool was tried when
    there is a `<tool_response>`, and used when it says "This is the zoom-in image".

    Source: InternLM/ARM-Thinker@96b1baf, `pair_rm_with_tool_reward_v8`. "upstream": the model can
    write the tool's words itself. "fixed": both must come from a `<tool_response>` before the last
    turn, the sentence inside the response.
    """
    turns = text.split("assistant\n")
    last = turns[-1].strip()
    banned = pattern(r"(?i)</?tool_call>").search(last)
    if banned or pattern(_LAST_TURN).fullmatch(last) is None:
        return 0.0
    opened = last.lower().find("<answer>") + len("<answer>")
    said = last[opened : last.lower().rfind("</answer>")].strip()
    verdict = None
    said_end = said if compat == "upstream" else said[-MAX_VERDICT:]
    for found in pattern(_CHOICE).finditer(said_end):
        verdict = found.group(1)
    said = verdict if verdict is not None else said.lower()
    right = said == str(solution).strip().lower()
    tried, used = _tools(text if compat == "upstream" else text[: -len(last)], compat)
    if right:
        return 1.5 if used else 1.0
    return 0.4 if tried else 0.3


def _tools(text: str, compat: str) -> tuple[bool, bool]:
    tried, sign = "<tool_response>" in text, "This is the zoom-in image"
    if compat == "upstream":
        return tried, sign in text
    responses = text.split("<tool_response>")[1:]
    return tried, any(sign in response.split("</tool_response>")[0] for response in responses)
