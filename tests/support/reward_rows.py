# SPDX-License-Identifier: Apache-2.0
"""A usable data row for every registered reward, for tests that run all of them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from fastgrpo import rewards

BOXES = [
    {"bbox_2d": [10, 10, 110, 110], "label": "cat"},
    {"bbox_2d": [200, 200, 300, 300], "label": "dog"},
]
_OBJECTS = [{"bbox_2d": [10, 10, 110, 110], "point_2d": [60, 60]}]
_POSITIONS = [{"Position": [10, 10, 110, 110], "Confidence": 1.0}]
_METRO = {"Line 1": ["A", "B", "C"], "Line 2": ["C", "D"]}
_DETECTION = f"<answer>```json\n{json.dumps(BOXES)}\n```</answer>"
_ROLLOUT = SimpleNamespace(steps=[SimpleNamespace(tool="crop", ok=True)], retrieved=["p1", "p2"])

# Columns by reward, or by the system that all its rewards share.
COLUMNS: dict[str, dict[str, Any]] = {
    "vlm_r1": {"solution": "<answer> 42 </answer>", "completion_ids": range(64)},
    "vlm_r1/iou": {"solution": [10, 10, 110, 110]},
    "vlm_r1/iou_internvl": {"solution": [10, 10, 110, 110]},
    "vlm_r1/iou_glm": {"solution": [10, 10, 110, 110]},
    "vlm_r1/mcq": {"solution": "<answer> B </answer>"},
    "vlm_r1/yes_no": {"solution": "<answer> yes </answer>"},
    "vlm_r1/map": {"solution": _DETECTION},
    "vlm_r1/od_ap": {"solution": _DETECTION},
    "vlm_r1/od_ap50": {"solution": _DETECTION},
    "vlm_r1/od_length": {"solution": _DETECTION},
    "vlm_r1/odLength": {"solution": _DETECTION},
    "vlm_r1/map50": {"solution": _DETECTION},
    "vlm_r1/weighted_sum": {"solution": _DETECTION},
    "vlm_r1/cosine_accuracy": {"solution": _DETECTION, "completion_ids": range(64)},
    "vlm_r1/accuracy": {"solution": _DETECTION, "accu_reward_method": "od_ap"},
    "visual_rft": {"solution": f"<answer>{_POSITIONS}</answer>"},
    "visual_rft/classification": {"solution": "<answer> golden retriever </answer>"},
    "visual_rft/giou": {"solution": "<answer> (100,100),(300,300) </answer>"},
    "v_triune": {"solution": f"<answer>{json.dumps(BOXES)}</answer>"},
    "v_triune/math": {"solution": "42"},
    "vision_r1": {"solution": [[item["label"], item["bbox_2d"]] for item in BOXES]},
    "perception_r1": {"solution": "42", "judge_output": "<info1>1</info1><info2>0</info2>"},
    "perception_r1/grounding": {"solution": [100, 100, 300, 300]},
    "affordance_r1": {"solution": json.dumps(_OBJECTS), "affordance": "grasp"},
    "spatialladder": {"answer": "2.0", "accu_reward_method": "na"},
    "curr_reft/stage1": {"solution": "<answer>yes</answer>"},
    "curr_reft/stage2": {"solution": "<answer>A,C</answer>"},
    "curr_reft/stage3": {"solution": "<answer>[10, 10, 110, 110]</answer>", "task": "detection"},
    "curr_reft": {"task": "detection"},
    "q_insight": {"solution": 3.5, "task": "score"},
    "q_insight/comparison": {"solution": "Image A"},
    "vicrit": {"original_noun_phrase": "a brown cat", "changed_noun_phrase": "a brown dog"},
    "rewardmap": {
        "solution": None,
        "type": "planning",
        "difficulty_city": "hard",
        "metro_data": _METRO,
        "station1": "A",
        "station2": "D",
        "question_transfer_count": 1,
    },
    "vrag_rl": {
        "retrieved": ["p1", "p2"],
        "relevant": ["p2"],
        "solution": "42",
        "environments": _ROLLOUT,
    },
    "three_d_r1": {"gt_boxes": [[0, 0, 0, 2, 2, 2]], "solution": "a chair"},
    "vision_sr1": {"solution": "42", "description_answer": "<think>x</think>\\boxed{42}"},
    "rm_r1": {"solution": "model_a"},
    "unifiedreward_think": {"solution": "Image 1 is better"},
    "arm_thinker": {"solution": 1, "environments": _ROLLOUT},
    "agent0_vl": {"solution": "42", "environments": _ROLLOUT},
    "sophiavl_r1": {"solution": "the cat sat on the mat", "problem_type": "free_form"},
    "sophiavl_r1/math": {"solution": "42"},
    "sophiavl_r1/choices": {"solution": ["A", "B"]},
    "dip_r1": {"solution": _DETECTION},
    "grip": {"solution": _DETECTION, "salience": [2.0, 1.0]},
    "vacot": {"solution": "42", "tool_needed": True, "environments": _ROLLOUT},
    "harmo": {"acc_reward": 1.0, "solution": "42"},
    "listener": {"solution": "B", "listener_probability": 0.5},
    "vlaa_thinking": {"solution": "42", "problem_type": "digit"},
    "pcpg": {"solution": "hello world"},
    "magicgui": {"solution": {"type": "click", "point": [0.5, 0.5], "boxes": []}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "v_triune/detection": {"step": 11, "total_steps": 100},
    "v_triune/total": {"step": 11, "total_steps": 100},
}
# Rewards whose value depends on the rest of the group, and those that ask the worker processes.
GROUPWISE = ("dip_r1/look", "syn_grpo/diversity", "harmo/length_penalty")
MATHEMATICAL = (
    "vlm_r1/math",
    "vlm_r1/default",
    "v_triune/math",
    "perception_r1/accuracy",
    "perception_r1/total",
    "vision_sr1/accuracy",
    "vision_sr1/description_accuracy",
    "vision_sr1/total",
    "sophiavl_r1/math",
    "agent0_vl/episode",
    "vacot/episode",
    "vacot/total",
    "harmo/hybrid",
)


def row(name: str) -> dict[str, Any]:
    """The columns of `name` for one completion."""
    system = name.split("/")[0]
    given = COLUMNS.get(name, COLUMNS.get(system, {}))
    function = rewards.get(name)
    return {key: given[key] for key in (*function.columns, *function.optional) if key in given}


def call(name: str, completions: list[Any], compat: str = "fixed") -> list[float | None]:
    """The reward of every completion, all with the same row."""
    function = rewards.get(name, compat=compat, **SETTINGS.get(name, {}))
    columns = {key: [value] * len(completions) for key, value in row(name).items()}
    return function(None, completions, **columns)
