# SPDX-License-Identifier: Apache-2.0
"""What compat="fixed" gives for VLM-R1's recorded quirks, derived by hand."""

from __future__ import annotations

from typing import Any

_ACCURACY = "grpo_jsonl.accuracy_reward"

# By function, method and start of the note. None: the solution is unusable, the row is left out.
FIXED: dict[tuple[str, str | None, str], float | None] = {
    ("grpo_jsonl.iou", None, "x swapped only"): 0.0,
    ("grpo_jsonl.iou", None, "1x1 identical"): 1.0,
    ("grpo_jsonl.iou", None, "1-pixel overlap"): 1 / 220,
    ("Qwen2VLModule.iou_reward", None, "full-width Chinese digits"): 0.0,
    ("GLMVModule.iou_reward", None, "GLM: true +0 IoU"): 0.7414187643020596,
    ("Qwen2VLModule.format_reward_rec", None, "missing </think>"): 0.0,
    ("InvernVLModule.format_reward_rec", None, "missing </think>"): 0.0,
    ("GLMVModule.format_reward_rec", None, "missing </think>"): 0.0,
    # Half of each class's predictions hit: AP 1/2 per class, odLength times 2 boxes of 4.
    (_ACCURACY, "odLength", "duplicated predictions"): 0.25,
    (_ACCURACY, "od_ap", "duplicated predictions"): 0.5,
    (_ACCURACY, "od_ap50", "duplicated predictions"): 0.5,
    # cat 1, dog 1, unicorn 0; odLength times 2 boxes of 7; 5 of 7 predictions are false.
    (_ACCURACY, "odLength", "5 boxes of a label"): 2 / 3 * 2 / 7,
    (_ACCURACY, "od_ap", "5 boxes of a label"): 2 / 3,
    (_ACCURACY, "od_ap50", "5 boxes of a label"): 2 / 3,
    (_ACCURACY, "weighted_sum", "5 boxes of a label"): 0.7 + 0.3 * (1 - 5 / 14),
    (_ACCURACY, "weighted_sum", "one extra false positive at the END"): 0.95,
    (_ACCURACY, "od_ap", "GT with x swapped"): None,
    (_ACCURACY, "od_ap50", "GT with x swapped"): None,
    (_ACCURACY, "odLength", "GT with x swapped"): None,
    (_ACCURACY, "weighted_sum", "GT with x swapped"): None,
    # Classes: dog 1, cat missed, and the box without a label as a class of its own.
    (_ACCURACY, "od_ap", "first prediction lacks"): 1 / 3,
    (_ACCURACY, "od_ap50", "first prediction lacks"): 1 / 3,
    (_ACCURACY, "odLength", "first prediction lacks"): 1 / 3,
    (_ACCURACY, "od_ap", "second prediction lacks"): 1 / 3,
    (_ACCURACY, "od_ap50", "second prediction lacks"): 1 / 3,
    (_ACCURACY, "odLength", "second prediction lacks"): 1 / 3,
    # One of two matched: position 1/2, missed 1/2, false 1/2.
    (_ACCURACY, "weighted_sum", "first prediction lacks"): 0.5,
    (_ACCURACY, "weighted_sum", "second prediction lacks"): 0.5,
    (_ACCURACY, "weighted_sum", "empty list while GT None"): 1.0,
    (_ACCURACY, "od_ap", "empty list while GT None"): 1.0,
    (_ACCURACY, "od_ap50", "empty list while GT None"): 1.0,
    (_ACCURACY, "odLength", "empty list while GT None"): 1.0,
    (_ACCURACY, "odLength", "no answer tag"): 0.0,
    (_ACCURACY, "od_ap", "no answer tag"): 0.0,
    (_ACCURACY, "od_ap50", "no answer tag"): 0.0,
    (_ACCURACY, "yes_no", "neither side has yes/no"): None,
    (_ACCURACY, "yes_no", '"not" contains no'): 0.0,
    (_ACCURACY, "default", "multi-line GT"): 0.0,
    ("grpo_jsonl.detection_score", None, "malformed GT JSON"): None,
    # Right answers 0.75 + 0.25 cos(pi L / 1024), wrong ones 0.25 cos(pi L / 1024) - 0.25.
    ("grpo_jsonl.cosine_reward", "right 0", "0.75+0.25*cos"): 1.0,
    ("grpo_jsonl.cosine_reward", "right 256", "0.75+0.25*cos"): 0.9267766952966369,
    ("grpo_jsonl.cosine_reward", "wrong 256", "0.75+0.25*cos"): -0.07322330470336313,
}


def fixed_value(case: dict[str, Any]) -> tuple[bool, float | None]:
    """(whether FIXED knows the recorded case, the value of compat="fixed")."""
    inputs, method = case["inputs"], case["inputs"].get("accu_reward_method")
    if "gen_len" in inputs:
        method = f"{'right' if inputs['acc_reward'] >= 0.7 else 'wrong'} {inputs['gen_len']}"
    for (function, wanted, note), value in FIXED.items():
        if (function, wanted) == (case["function"], method) and case["note"].startswith(note):
            return True, value
    return False, None
