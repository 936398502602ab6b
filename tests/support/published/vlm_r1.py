# SPDX-License-Identifier: Apache-2.0
"""Recorded calls of VLM-R1's rewards and evaluation scripts."""

from __future__ import annotations

import json

from fastgrpo.ops.box_iou import box_iou
from fastgrpo.rewards.read import tags
from fastgrpo.rewards.read.mathematics import numbers_equal
from fastgrpo.rewards.read.words import clean_text
from fastgrpo.rewards.systems.vlm_r1_answers_upstream import extract_choice
from fastgrpo.rewards.systems.vlm_r1_detection_upstream import detection_score, upstream_map
from fastgrpo.rewards.systems.vlm_r1_upstream import pixel_iou, rescale
from published import adapter, answered, fenced, one

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
def vlm_r1_iou(inputs, compat="upstream"):
    if compat == "upstream":
        return pixel_iou(inputs["box1"], inputs["box2"])
    return box_iou([inputs["box1"]], [inputs["box2"]]).item()


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
def vlm_r1_detection_score(inputs, compat="upstream"):
    if compat == "fixed":
        return one("vlm_r1/weighted_sum", inputs["content"], compat, solution=inputs["sol"])
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
    right = inputs["acc_reward"] if "acc_reward" in inputs else inputs["acc_reward_arg"]
    return one("vlm_r1/length", "", compat, completion_ids=range(tokens), acc_reward=right)


@adapter("VLM-R1", "grpo_jsonl.extract_choice")
def vlm_r1_extract_choice(inputs):
    return extract_choice(inputs["text"])


@adapter("VLM-R1", "grpo_jsonl.clean_text")
def vlm_r1_clean_text(inputs):
    return clean_text(inputs["text"])


@adapter("VLM-R1", "grpo_jsonl.numeric_reward")
def vlm_r1_numeric(inputs):
    equal = numbers_equal(clean_text(inputs["content"]), clean_text(inputs["sol"]))
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


# Evaluation scripts

_INT = rf"({tags.DIGIT}+)"
_BLANK = f"{tags.SPACE}*"
_INTS = rf"\[{_INT},{_BLANK}{_INT},{_BLANK}{_INT},{_BLANK}{_INT}\]"
_EVAL_BOXES = {"test_rec_r1": rf"\{{.*{_INTS}{_BLANK}.*\}}", "test_rec_r1_internvl": _INTS}


def _eval_script(script: str, shape: str) -> None:
    @adapter("VLM-R1", f"eval.{script}.extract_bbox_answer")
    def extract_bbox_answer(inputs):
        content = tags.answer(inputs["content"])
        found = content and tags.pattern(shape).search(content)
        return [int(number) for number in found.groups()] if found else [0, 0, 0, 0]


for _script, _shape in _EVAL_BOXES.items():
    _eval_script(_script, _shape)


@adapter("VLM-R1", "eval.test_rec_baseline.extract_bbox_answer")
def eval_baseline_box(inputs):
    digit = tags.DIGIT
    number = rf"({_BLANK}-?{digit}*\.?{digit}+{_BLANK})"
    gap = f",{_BLANK}"
    shape = rf"\[{number}{gap}{number}{gap}{number}{gap}{number}\]"
    found = tags.pattern(shape).search(inputs["content"])
    return [float(number) for number in found.groups()] if found else [0, 0, 0, 0]


@adapter("VLM-R1", "eval.test_od_r1.extract_bbox_answer")
def eval_first_box(inputs):
    try:
        block = tags.fenced_json(inputs["content"])
        return [json.loads(block.strip())[0]["bbox_2d"], False]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return [[0, 0, 0, 0], False]


@adapter("VLM-R1", "eval.test_rec_r1.resize_bbox")
def eval_resize(inputs):
    grid, size = (1, inputs["input_height"], inputs["input_width"]), ("image_width", "image_height")
    return rescale(inputs["bbox"], grid, [inputs[key] for key in size], 1)
