# SPDX-License-Identifier: Apache-2.0
"""One of our rewards (TRL's signature) in the form another framework calls.

Each adapter takes `f(prompts, completions, **columns) -> list[float | None]`, for example
`fastgrpo.rewards.get("vlm_r1/iou")`, and returns what the framework's own documentation asks for.
None means "not scored" here; frameworks that need a number get `missing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgrpo.errors import InputError

Reward = Callable[..., list[float | None]]


def as_vlm_r1(reward: Reward, *, missing: float = 0.0) -> Callable[..., list[float]]:
    """For VLM-R1's `reward_funcs_registry`: the same call, numbers only.

    Source: om-ai-lab/VLM-R1, `grpo_jsonl.py`.
    """

    def vlm_r1_reward(completions: list, **columns) -> list[float]:
        scores = reward(completions=completions, **({"prompts": None} | columns))
        return [missing if score is None else float(score) for score in scores]

    return _named(vlm_r1_reward, reward)


def as_verl(
    reward: Reward, *, column: str = "solution", missing: float = 0.0
) -> Callable[..., float]:
    """For verl's `custom_reward_function`: one response at a time.

    `ground_truth` becomes the column named `column`, the entries of `extra_info` the others.
    Source: verl, `compute_score(data_source, solution_str, ground_truth, extra_info)`.
    """

    def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: dict | None = None,
        **kwargs,
    ) -> float:
        columns = {name: [value] for name, value in (extra_info or {}).items()}
        columns |= {"data_source": [data_source], column: [ground_truth]}
        (score,) = _score(reward, [solution_str], columns)
        return missing if score is None else float(score)

    return _named(compute_score, reward)


def as_easyr1(
    reward: Reward, *, column: str = "solution", missing: float = 0.0
) -> Callable[[list[dict]], list[dict[str, float]]]:
    """For EasyR1's batch reward (`REWARD_TYPE = "batch"` in the file it loads).

    Each input is `{"response", "response_length", "ground_truth"}`; the result is
    `{"overall": score}` per input. Source: hiyouga/EasyR1, `verl/workers/reward`.
    """

    def compute_score(reward_inputs: list[dict], **kwargs) -> list[dict[str, float]]:
        texts = [row["response"] for row in reward_inputs]
        scores = _score(reward, texts, {column: [row["ground_truth"] for row in reward_inputs]})
        return [{"overall": missing if score is None else float(score)} for score in scores]

    return _named(compute_score, reward)


def as_swift_orm(reward: Reward, *, missing: float | None = None) -> type:
    """For ms-swift's `orms[name] = as_swift_orm(reward)` in an `--external_plugins` file.

    A class whose instances take completions as texts and the dataset's columns as lists. None is
    passed on, as ms-swift leaves it out of the reward. Source: modelscope/ms-swift, `ORM`.
    """

    class RewardORM:
        def __init__(self, *args, **kwargs):
            pass

        def __call__(self, completions: list[str], **columns) -> list[float | None]:
            scores = _score(reward, completions, columns)
            return [missing if score is None else float(score) for score in scores]

    RewardORM.__name__ = getattr(reward, "__name__", "RewardORM")
    RewardORM.__doc__ = reward.__doc__
    return RewardORM


def as_openrlhf(
    reward: Reward, *, column: str = "solution", missing: float = 0.0
) -> Callable[..., dict[str, Any]]:
    """For OpenRLHF's `--remote_rm_url reward.py`, which calls its `reward_func`.

    `queries` are prompt and response in one text, `prompts` their prompts, `labels` become the
    column named `column`. Raises `InputError` if a query does not begin with its prompt.
    Source: OpenRLHF, `reward_func(queries, prompts, labels)`.
    """

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **kwargs
    ) -> dict[str, Any]:
        texts = []
        for row, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            if not query.startswith(prompt):
                raise InputError(f"queries[{row}] does not begin with prompts[{row}]")
            texts.append(query[len(prompt) :])
        scores = _score(reward, texts, {column: list(labels)})
        values = torch.tensor([missing if score is None else float(score) for score in scores])
        return {"rewards": values, "scores": values, "extra_logs": {}}

    return _named(reward_func, reward)


def _score(reward: Reward, texts: Sequence[str], columns: dict[str, list]) -> list[float | None]:
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    arguments = {"prompts": [None] * len(completions)} | columns
    scores = reward(completions=completions, **arguments)
    if len(scores) != len(completions):
        raise InputError(f"the reward returned {len(scores)} scores for {len(completions)} texts")
    return scores


def _named(function: Callable, reward: Reward) -> Callable:
    """Frameworks log a reward under its function's name."""
    function.__name__ = getattr(reward, "__name__", function.__name__)
    function.__doc__ = reward.__doc__
    return function
