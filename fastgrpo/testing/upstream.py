"""The published reward code's recorded calls, as calls of our rewards with compat="upstream".

`ADAPTERS[(system, function)]` maps the inputs of a recorded case to its output; `FIXED` says what
the repaired reward gives for the cases whose behaviour is a quirk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastgrpo import rewards
from fastgrpo.rewards import text as text_module
from fastgrpo.rewards.boxes import iou_vlm_r1
from fastgrpo.rewards.vlm_r1_detection import detection_score, upstream_map

Adapter = Callable[..., Any]
ADAPTERS: dict[tuple[str, str], Adapter] = {}


def adapter(system: str, *functions: str):
    def register(call: Adapter) -> Adapter:
        ADAPTERS.update({(system, function): call for function in functions})
        return call

    return register


def one(
    name: str, completion: str, compat: str = "upstream", params: dict | None = None, **columns
):
    """The reward of one completion."""
    function = rewards.get(name, compat=compat, **(params or {}))
    return function(None, [completion], **{key: [value] for key, value in columns.items()})[0]


def fenced(items: Any) -> str:
    return f"```json\n{json.dumps(items)}\n```"


def answered(content: str) -> str:
    return f"<think>t</think><answer>{content}</answer>"


# VLM-R1

_FAMILIES = {"Qwen2VLModule": "qwen", "InvernVLModule": "internvl", "GLMVModule": "glm"}


def _vlm_r1_module(module: str, family: str) -> None:
    @adapter("VLM-R1", f"{module}.iou_reward")
    def iou_reward(inputs, compat="upstream"):
        columns = {
            ours: inputs[theirs]
            for ours, theirs in (
                ("solution", "solution"),
                ("image_size", "image_size_wh"),
                ("image_grid_thw", "image_grid_thw"),
            )
            if theirs in inputs
        }
        return one("vlm_r1/iou", inputs["completion"], compat, {"family": family}, **columns)

    @adapter("VLM-R1", f"{module}.format_reward_rec")
    def format_reward_rec(inputs, compat="upstream"):
        return one("vlm_r1/format_rec", inputs["completion"], compat, {"family": family})


for _module, _family in _FAMILIES.items():
    _vlm_r1_module(_module, _family)


@adapter("VLM-R1", "grpo_jsonl.format_reward")
def vlm_r1_format(inputs, compat="upstream"):
    return one("vlm_r1/format", inputs["completion"], compat)


@adapter("VLM-R1", "grpo_jsonl.iou")
def vlm_r1_iou(inputs):
    return iou_vlm_r1(inputs["box1"], inputs["box2"])


@adapter("VLM-R1", "grpo_jsonl.accuracy_reward")
def vlm_r1_accuracy(inputs, compat="upstream"):
    return one(
        "vlm_r1/accuracy",
        inputs["completion"],
        compat,
        solution=inputs["solution"],
        accu_reward_method=inputs.get("accu_reward_method", "default"),
    )


@adapter("VLM-R1", "grpo_jsonl.detection_score")
def vlm_r1_detection_score(inputs):
    weights = {k: inputs[k] for k in ("iou_threshold", "alpha", "beta", "gamma") if k in inputs}
    return detection_score(inputs["content"], inputs["sol"], **weights)


@adapter("VLM-R1", "grpo_jsonl.map_reward")
def vlm_r1_map_reward(inputs):
    return upstream_map(
        inputs["content"],
        inputs["sol"],
        inputs.get("score_type", 0),
        inputs.get("length_reward", False),
    )


@adapter("VLM-R1", "grpo_jsonl.repetition_reward", "repetition_reward")
def vlm_r1_repetition(inputs, compat="upstream"):
    return one("vlm_r1/repetition", inputs["content"], compat)


@adapter("VLM-R1", "grpo_jsonl.cosine_reward", "cosine_reward (length)")
def vlm_r1_cosine(inputs, compat="upstream"):
    tokens = inputs["gen_len"] if "gen_len" in inputs else inputs["gen_len_tokens"]
    return one("vlm_r1/length", "", compat, completion_ids=range(tokens))


@adapter("VLM-R1", "grpo_jsonl.extract_choice")
def vlm_r1_extract_choice(inputs):
    return text_module.extract_choice(inputs["text"])


@adapter("VLM-R1", "grpo_jsonl.clean_text")
def vlm_r1_clean_text(inputs):
    return text_module.clean_text(inputs["text"])


@adapter("VLM-R1", "grpo_jsonl.numeric_reward")
def vlm_r1_numeric(inputs):
    from fastgrpo.rewards.math_answers import numbers_equal

    clean = text_module.clean_text
    equal = numbers_equal(clean(inputs["content"]), clean(inputs["sol"]))
    return None if equal is None else float(equal)


@adapter("VLM-R1", "detection_score (weighted_sum)")
def vlm_r1_weighted_sum(inputs, compat="upstream"):
    weights = {k: inputs[k] for k in ("iou_threshold", "alpha", "beta", "gamma") if k in inputs}
    solution = fenced(inputs["gt"])
    return one("vlm_r1/weighted_sum", fenced(inputs["pred"]), compat, weights, solution=solution)


@adapter("VLM-R1", "map_reward / odLength_reward")
def vlm_r1_map_and_length(inputs, compat="upstream"):
    text, solution = answered(fenced(inputs["pred"])), answered(fenced(inputs["gt"]))
    return {
        "mAP": one("vlm_r1/map", text, compat, solution=solution),
        "mAP50": one("vlm_r1/map", text, compat, {"score_type": 1}, solution=solution),
        "odLength": one("vlm_r1/od_length", text, compat, solution=solution),
    }


@adapter("VLM-R1", "default_accuracy_reward")
def vlm_r1_default(inputs, compat="upstream"):
    return one("vlm_r1/default", inputs["content"], compat, solution=inputs["solution"])
