# SPDX-License-Identifier: Apache-2.0
"""A judge over HTTP as a reward: how well the answer agrees with the row's solution, 0 to 1."""

import os

from fastgrpo.judges import HTTPJudge


def question(prompt: str, completion: str, row: dict) -> list[dict]:
    """What the judge is asked about one completion."""
    text = (
        f"Reference answer: {row['solution']}\n\nAnswer: {completion}\n\n"
        "How well does the answer agree with the reference? Reply with `Score: ` and a number "
        "from 0 to 1."
    )
    return [{"role": "user", "content": text}]


agrees = HTTPJudge(
    os.environ.get("FASTGRPO_JUDGE_URL", "http://127.0.0.1:8000/v1"),
    os.environ.get("FASTGRPO_JUDGE_MODEL", "judge"),
    question,
    columns=["solution"],
    name="agrees",
    fallback=None,  # a completion without a verdict takes no part
)
