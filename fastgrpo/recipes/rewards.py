# SPDX-License-Identifier: Apache-2.0
"""From a recipe's specifications to reward functions.

A specification is a mapping with exactly one of these keys (`compose` may have a `judge` beside):

  reward: NAME       a registered reward; `compat`, `params` as in `fastgrpo.rewards.get`
  judge: {...}       a language model over HTTP (`HTTPJudge`); `url` and `model` come from the
                     environment variables FASTGRPO_JUDGE_URL and FASTGRPO_JUDGE_MODEL when absent;
                     `prompt` is a template with {problem}, {solution}, {completion}, or any column
  model: PATH        a sequence classifier of transformers, null for the environment variable
                     FASTGRPO_REWARD_MODEL; `transform: sigmoid`
  compose: KIND      a reward made of others: scheduled, gated, par (and its family), running,
                     majority_vote, cross_vote, trust, step_refined, judged (a judge's replies in
                     `column`); parts under `parts`, options beside
  second_pass, listener, follow_up, co_trained, implicit_process: {...}
                     the `from_trainer` of `fastgrpo.judges`' classes, which takes the fields

and optionally `weight` (the recipe's) and `name`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fastgrpo import rewards
from fastgrpo.errors import InputError
from fastgrpo.judges import (
    Bound,
    ChoiceProbability,
    CoTrainedReward,
    FollowUpLikelihood,
    HTTPJudge,
    ImplicitProcessReward,
    ModelReward,
    SecondPass,
)
from fastgrpo.rewards.core import compose
from fastgrpo.rewards.core.schedule import Schedule
from fastgrpo.rewards.read.tags import answer

BOUND = ("second_pass", "listener", "follow_up", "co_trained", "implicit_process")
KINDS = ("reward", "judge", "model", "compose", *BOUND)
TRANSFORMS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


def build_reward(spec: Mapping[str, Any], *, group_size: int) -> Callable:
    """The reward function of one specification; `InputError` names what is wrong in it."""
    kinds = ["compose"] if "compose" in spec else [k for k in KINDS if k in spec]
    if len(kinds) != 1:
        raise InputError(f"reward: expected exactly one of {KINDS}, got {sorted(spec)}")
    options = {k: v for k, v in spec.items() if k not in ("weight", "name", kinds[0])}
    if kinds[0] in BOUND:
        function = _bound(kinds[0], dict(spec[kinds[0]]), group_size)
    else:
        build = {"reward": _registered, "judge": _judge, "model": _model, "compose": _composite}
        function = build[kinds[0]](spec[kinds[0]], options, group_size)
    if "name" in spec:
        function.__name__ = str(spec["name"]).replace("/", "_")
    return function


def _registered(name: str, options: Mapping, group_size: int) -> Callable:
    params = options.get("params", {})
    return rewards.get(name, options.get("compat", "fixed"), **params)


def _judge(settings: Mapping, options: Mapping, group_size: int) -> Callable:
    settings = dict(settings)
    template = settings.pop("prompt")
    url = settings.pop("url", None) or os.environ.get("FASTGRPO_JUDGE_URL")
    model = settings.pop("model", None) or os.environ.get("FASTGRPO_JUDGE_MODEL", "default")
    if not url:
        raise InputError("judge: give `url` or set FASTGRPO_JUDGE_URL to an OpenAI-compatible URL")

    def messages(prompt: str, completion: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        values = {**row, "prompt": prompt, "completion": completion}
        return [{"role": "user", "content": _fill(template, values)}]

    return HTTPJudge(url, model, messages, **settings)


def _fill(template: str, values: Mapping[str, Any]) -> str:
    """`{name}` replaced by values; other braces stay, and values are never read as templates."""
    parts, position = [], 0
    while (start := template.find("{", position)) >= 0:
        end = template.find("}", start)
        name = template[start + 1 : end] if end > start else ""
        parts.append(template[position:start])
        if name in values:
            parts.append(str(values[name]))
            position = end + 1
        else:
            parts.append("{")
            position = start + 1
    return "".join([*parts, template[position:]])


def _model(path: str | None, options: Mapping, group_size: int) -> Callable:
    path = path or os.environ.get("FASTGRPO_REWARD_MODEL")
    if not path:
        raise InputError("model: give a path or set FASTGRPO_REWARD_MODEL")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = options.get("transform")
    if name is not None and name not in TRANSFORMS:
        raise InputError(f"transform: expected one of {sorted(TRANSFORMS)}, got {name!r}")
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    return ModelReward.from_classifier(model, tokenizer, transform=TRANSFORMS.get(name))


def _composite(kind: str, options: Mapping, group_size: int) -> Callable:
    options = dict(options)
    parts = [build_reward(p, group_size=group_size) for p in options.pop("parts", ())]
    if kind == "scheduled":
        return compose.Scheduled(*parts, Schedule.parse(options["schedule"]))
    if kind == "gated":
        gate, *inner = parts
        return compose.Gated(gate, inner, **options)
    if kind in compose.RELATIVE:
        return compose.Relative(*parts, kind, **options)
    if kind in compose.RunningShaper.KINDS:
        return compose.Running(*parts, kind)
    if kind == "majority_vote":
        return compose.MajorityVote(answer, group_size)
    if kind == "cross_vote":
        return compose.CrossVote(answer)
    if kind == "trust":
        return compose.Trust(*parts, group_size, **options)
    if kind == "judged":
        judge = _judge(options["judge"], {}, group_size)
        return compose.Annotated(*parts, options["column"], judge.replies)
    if kind == "step_refined":
        split, judge = options.pop("split", "\n\n"), _judge(options.pop("judge"), {}, group_size)
        return compose.StepRefined(*parts, _step_scorer(judge, split), **options)
    raise InputError(f"compose: unknown kind {kind!r}")


def _step_scorer(judge: HTTPJudge, split: str) -> Callable:
    """Scores of a completion's steps, cut at ``split``: one judgement each, the answer last."""

    def score_steps(text: str, row: Mapping[str, Any]) -> list[float]:
        steps = [s for s in text.split(split) if s.strip()][:64]
        columns = {k: [v] * len(steps) for k, v in row.items()}
        scores = judge([""] * len(steps), steps, **columns) if steps else []
        return [0.0 if s is None else s for s in scores]

    return score_steps


def _bound(kind: str, settings: dict, group_size: int) -> Callable:
    """A judge made when its trainer is there."""
    name = settings.pop("name", kind)

    def part(key: str) -> Callable:
        return build_reward(settings.pop(key), group_size=group_size)

    if kind == "second_pass":
        template, inner = settings.pop("prompt"), part("reward")
        settings |= {
            "chat": lambda content, row: _fill(template, {**row, "content": content}),
            "reward": inner,
        }
        return Bound(partial(SecondPass.from_trainer, **settings), name, inner.columns)
    if kind == "listener":
        return Bound(partial(ChoiceProbability.from_trainer, **settings), name, ["choice"])
    if kind == "follow_up":
        return Bound(partial(FollowUpLikelihood.from_trainer, **settings), name)
    settings |= {"rule": part("rule"), "group_size": group_size}
    columns = settings["rule"].columns
    if kind == "implicit_process":
        return Bound(partial(ImplicitProcessReward.from_trainer, **settings), name, columns)
    settings["path"] = settings.get("path") or os.environ.get("FASTGRPO_REWARD_MODEL")
    if not settings["path"]:
        raise InputError("co_trained: give `path` or set FASTGRPO_REWARD_MODEL")
    return Bound(partial(CoTrainedReward.from_trainer, **settings), name, columns)
