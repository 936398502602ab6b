# SPDX-License-Identifier: Apache-2.0
"""Recorded calls of the published systems other than VLM-R1."""

from __future__ import annotations

import json

import numpy as np

from fastgrpo.rewards.geometry.matching import match, overlaps
from fastgrpo.rewards.read import math_pool
from fastgrpo.rewards.read.items import Detections
from fastgrpo.rewards.systems import v_triune, v_triune_upstream
from fastgrpo.rewards.systems.perception_r1 import visual_scores
from fastgrpo.rewards.systems.rewardmap import difficulty_weight, planning_detail
from fastgrpo.rewards.systems.three_d_r1 import corners, iou_3d
from published import adapter, answered, one


def _answer_of(text: str) -> str:
    return f"<think>t</think><rethink>r</rethink><answer>{text}</answer>"


@adapter("Visual-RFT", "accuracy_reward_iou + accuracy_reward_confidence")
def visual_rft(inputs, compat="upstream"):
    text = answered(str(inputs["pred"]))
    solution = f"<answer>{inputs['gt']}</answer>"
    settings = {"iou_threshold": inputs.get("iou_threshold", 0.5)}
    return {
        "iou_reward": one("visual_rft/iou", text, compat, settings, solution=solution),
        "confidence_reward": one(
            "visual_rft/confidence", text, compat, settings, solution=solution
        ),
        "math_verify_precheck_fired": _precheck(text, solution),
    }


def _precheck(text: str, solution: str) -> bool:
    return math_pool.equal(text, solution).equal


@adapter("Visual-RFT", "grpo_lisa.accuracy_reward (GIoU+1)")
def visual_rft_lisa(inputs, compat="upstream"):
    solution = f"<answer> {inputs['gt']} </answer>"
    return one("visual_rft/giou", answered(inputs["pred"]), compat, solution=solution)


@adapter("V-Triune", "DetectionVerifier.verify_accuracy (DET_IOU_THRESHOLD=dynamic)")
def v_triune_detection(inputs, compat="upstream"):
    text = f"<think>\nt\n</think>\n<answer>\n{json.dumps(inputs['pred'])}\n</answer>"
    solution = f"<answer>{json.dumps(inputs['gt'])}</answer>"
    ratio = inputs["det_reward_ratio"]
    settings = {"step": inputs["step"], "total_steps": inputs["total_steps"], "ratio": ratio}
    final = one("v_triune/detection", text, compat, settings, solution=solution)
    said, truth = (v_triune.extract_boxes(v_triune.answer_of(t)) for t in (text, solution))
    form = one("v_triune/detection_format", text, compat)
    if said is None or truth is None:
        return {"final_score": final, "format": form} | dict.fromkeys(_V_TRIUNE_PARTS, 0.0)
    epsilon = v_triune.dynamic_threshold(inputs["step"], inputs["total_steps"])
    weights = [v_triune.weights_of(ratio)]
    parts = v_triune.detection_parts(
        [said], [truth], weights, (epsilon,), v_triune_upstream.iou_first_bug
    )
    parts = {key: float(values[0]) for key, values in parts.items()}
    penalty = parts["size_penalty"]
    scores = {f"pure_{theirs}": parts[ours] for ours, theirs in _V_TRIUNE_SCORES.items()}
    weighted = {f"weighted_{k}": parts[o] * penalty for o, k in _V_TRIUNE_SCORES.items()}
    return scores | weighted | {"final_score": final, "size_penalty": penalty, "format": form}


_V_TRIUNE_SCORES = {
    "iou_max_label_first": "iou_score_max_label",
    "iou_max_iou_first": "iou_score_max_iou",
    "map": "map_score",
    "map50": "map50_score",
    "map75": "map75_score",
}
_V_TRIUNE_PARTS = [
    "size_penalty",
    *(f"{kind}_{name}" for kind in ("pure", "weighted") for name in _V_TRIUNE_SCORES.values()),
]


def _v_triune_sides(inputs) -> list[list[Detections]]:
    boxes = [[i["bbox_2d"] for i in inputs[side]] for side in ("pred", "gt")]
    labels = [[i["label"].lower() for i in inputs[side]] for side in ("pred", "gt")]
    return [
        [Detections(np.array(b, dtype=np.float64).reshape(-1, 4), names)]
        for b, names in zip(boxes, labels, strict=True)
    ]


@adapter("V-Triune", "greedy_match_by_iou_max_iou_first")
def v_triune_iou_first(inputs):
    pairs = overlaps(*_v_triune_sides(inputs))
    matrices = v_triune_upstream.row_matrices(pairs, 0)
    recorded = v_triune_upstream.last_pair_matches(*matrices, inputs["iou_threshold"])
    return [{"pred_idx": p, "gt_idx": g, "iou": iou} for p, g, iou in recorded]


@adapter("V-Triune", "greedy_match_by_iou_max_label_first")
def v_triune_label_first(inputs):
    preds, gts = _v_triune_sides(inputs)
    threshold = inputs["iou_threshold"]
    found = match(overlaps(gts, preds), method="greedy_rows", threshold=threshold, same_label=True)
    recorded = zip(found.gt.tolist(), found.pred.tolist(), found.iou.tolist(), strict=True)
    return [{"pred_idx": p, "gt_idx": g, "iou": iou} for p, g, iou in recorded]


@adapter("V-Triune", "MathVerifyVerifier.verify_format / verify_accuracy")
def v_triune_math(inputs, compat="upstream"):
    return {
        "format": one("v_triune/math_format", inputs["pred"], compat),
        "accuracy": one("v_triune/math", inputs["pred"], compat, solution=inputs["solution"]),
    }


@adapter("Vision-R1", "precision_reward / recall_reward / dual_format_reward")
def vision_r1(inputs, compat="upstream"):
    items = [{"bbox_2d": box, "label": label} for label, box in inputs["pred"]]
    text = json.dumps(items)
    columns = {
        "solution": json.dumps(inputs["gt"]),
        "target_id_maps": json.dumps(inputs["target_id_map"]),
        "num_instances": len(inputs["gt"]),
    }
    settings = {"step": inputs["step"]}
    return {
        "precision": one("vision_r1/precision", text, compat, settings, **columns),
        "recall": one("vision_r1/recall", text, compat, settings, **columns),
        "format": one("vision_r1/format", text, compat, num_instances=len(inputs["gt"])),
    }


@adapter("Perception-R1 (PR1)", "pr1_grounding_reward")
def pr1_grounding(inputs, compat="upstream"):
    solution = inputs["solution"]
    return one("perception_r1/grounding", inputs["completion"], compat, solution=solution)


@adapter("Perception-R1 (PR1)", "pr1_grounding_format_reward")
def pr1_format(inputs, compat="upstream"):
    return one("perception_r1/grounding_format", inputs["completion"], compat)


@adapter("Perception-R1 (Xiao)", "extract_visual_scores -> visual reward")
def xiao_visual(inputs, compat="upstream"):
    judgement = inputs["judge_output"]
    return {
        "scores": visual_scores(judgement),
        "reward": one("perception_r1/visual", "", compat, judge_output=judgement),
    }


@adapter("Perception-R1 (Xiao)", "ngram_penalty_reward")
def xiao_ngrams(inputs, compat="upstream"):
    settings = {k: inputs[k] for k in ("ngram_size", "ngram_max_penalty")}
    return one("perception_r1/ngram_penalty", inputs["text"], compat, settings)


@adapter("Affordance-R1", "aff_r1_score_accuracy_reward")
def affordance_accuracy(inputs, compat="upstream"):
    given = inputs.get("thresholds", {})
    names = {"iou>": "iou_above", "l1<": "l1_below", "point_dist<": "point_below"}
    settings = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    text, solution = _answer_of(json.dumps(inputs["pred"])), json.dumps(inputs["gt"])
    return one("affordance_r1/accuracy", text, compat, settings, solution=solution)


@adapter("Affordance-R1", "aff_r1_score_format_reward")
def affordance_format(inputs, compat="upstream"):
    return one("affordance_r1/format", inputs["completion"], compat)


@adapter("Affordance-R1", "aff_r1_score (total)")
def affordance_total(inputs, compat="upstream"):
    items = [{**item, "affordance": "grasp"} for item in inputs["pred"]]
    settings = {"similarity": lambda words, word: inputs["word2vec_similarity_stub"]}
    return one(
        "affordance_r1/total",
        _answer_of(json.dumps(items)),
        compat,
        settings,
        solution=json.dumps(inputs["gt"]),
        affordance="grasp",
    )


@adapter("SpatialLadder", "accuracy_reward (mca / na = mean relative accuracy)")
def spatialladder_accuracy(inputs, compat="upstream"):
    columns = {k: inputs[k] for k in ("answer", "accu_reward_method")}
    return one("spatialladder/accuracy", inputs["completion"], compat, **columns)


@adapter("SpatialLadder", "format_reward")
def spatialladder_format(inputs, compat="upstream"):
    return one("spatialladder/format", inputs["completion"], compat)


def _curr_reft_stage(stage: int) -> None:
    @adapter("Curr-ReFT", f"Stage{stage} iou_reward (accuracy) + format_reward")
    def curr_reft(inputs, compat="upstream"):
        columns = {k: inputs[k] for k in ("solution", "task")}
        if stage == 2:
            del columns["task"]
        name = f"curr_reft/stage{stage}"
        return {
            "accuracy": one(name, inputs["completion"], compat, **columns),
            "format": one("curr_reft/format", inputs["completion"], compat, task=inputs["task"]),
        }


for _stage in (1, 2, 3):
    _curr_reft_stage(_stage)


@adapter("Q-Insight", "score_reward + format_reward")
def q_insight(inputs, compat="upstream"):
    text, task = inputs["completion"], inputs["task"]
    if task == "comparison":
        accuracy = one("q_insight/comparison", text, compat, solution=inputs["solution"])
    else:
        settings = {"score_reward_threshold": inputs.get("score_reward_threshold", 0.35)}
        columns = {"solution": inputs["solution"], "task": task}
        accuracy = one("q_insight/score", text, compat, settings, **columns)
    return {"accuracy": accuracy, "format": one("q_insight/format", text, compat, task=task)}


@adapter("ViCrit", "score.relaxed_correctness")
def vicrit(inputs, compat="upstream"):
    columns = {k: inputs[k] for k in ("original_noun_phrase", "changed_noun_phrase")}
    return one("vicrit/answer", inputs["response"], compat, **columns) > 0


@adapter("RewardMap", "get_difficulty_weight")
def rewardmap_weight(inputs):
    return difficulty_weight(
        inputs["type"], inputs["question_transfer_count"], inputs["difficulty_city"]
    )


@adapter("RewardMap", "get_detailed_reward_planning / reason_map_compute_score")
def rewardmap_planning(inputs, compat="upstream"):
    ends = inputs["metro"], inputs["station1"], inputs["station2"]
    allowed = inputs["transfers"] + (compat == "fixed")
    return {
        "detail": planning_detail(inputs["answer"], *ends, inputs["transfers"], allowed),
        "score": one(
            "rewardmap/total",
            inputs["answer"],
            compat,
            solution=None,
            type="planning",
            difficulty_city=inputs["city"],
            metro_data=inputs["metro"],
            station1=inputs["station1"],
            station2=inputs["station2"],
            question_transfer_count=inputs["transfers"],
        ),
    }


@adapter("RewardMap", "reason_map_compute_score")
def rewardmap_question(inputs, compat="upstream"):
    names = {
        "metro": "metro_data",
        "metro_data": "metro_data",
        "station1": "station1",
        "station2": "station2",
        "transfers": "question_transfer_count",
        "question_transfer_count": "question_transfer_count",
    }
    return one(
        "rewardmap/total",
        inputs["response"],
        compat,
        {"mode": inputs.get("mode", "difficulty_aware")},
        solution=inputs["ground_truth"],
        type=inputs["type"],
        difficulty_city=inputs["city"],
        **{ours: inputs[theirs] for theirs, ours in names.items() if theirs in inputs},
    )


@adapter("VRAG-RL", "ndcg")
def vrag_ndcg(inputs, compat="upstream"):
    columns = {"retrieved": inputs["retrieved_in_order"], "relevant": inputs["gold"]}
    return one("vrag_rl/ndcg", "", compat, **columns)


@adapter("3D-R1", "RewardFunctions.compute_format_reward")
def three_d_format(inputs, compat="upstream"):
    return one("three_d_r1/format", inputs["text"], compat)


@adapter("3D-R1", "RewardFunctions.compute_3d_iou")
def three_d_iou(inputs):
    return iou_3d(corners(inputs["box1"]), corners(inputs["box2"]))


@adapter("3D-R1", "RewardFunctions.compute_perception_reward")
def three_d_perception(inputs, compat="upstream"):
    return one("three_d_r1/perception", inputs["text"], compat, gt_boxes=inputs["gt_boxes"])


@adapter("Vision-SR1", "compute_score (self-reward)")
def vision_sr1(inputs, compat="upstream"):
    solution, described = inputs["ground_truth"], inputs["description_answer"]
    columns = {"solution": solution, "description_answer": described}
    settings = {"format_weight": inputs["format_weight"]}
    text = inputs["predict"]
    return {
        "overall": one("vision_sr1/total", text, compat, settings, **columns),
        "format": one("vision_sr1/format", text, compat),
        "accuracy": one("vision_sr1/accuracy", text, compat, solution=solution),
        # The published code tests the second pass untouched, without tightening its tags.
        "description_format": one("vision_sr1/format", described, compat),
        "description_accuracy": one("vision_sr1/description_accuracy", text, compat, **columns),
    }


@adapter("RM-R1", "answer_reward")
def rm_r1(inputs, compat="upstream"):
    return one("rm_r1/answer", inputs["solution_str"], compat, solution=inputs["label"])


@adapter("UnifiedReward-Think", "accuracy_reward + format_reward")
def unified(inputs, compat="upstream"):
    text, solution = inputs["completion"], inputs["solution"]
    return {
        "accuracy": one("unifiedreward_think/accuracy", text, compat, solution=solution),
        "format": one("unifiedreward_think/format", text, compat),
    }


@adapter("ARM-Thinker", "pair_rm_with_tool_reward_v8.compute_score")
def arm_thinker(inputs, compat="upstream"):
    return one("arm_thinker/score", inputs["response"], compat, solution=inputs["ground_truth"])


def _sophiavl(kind: str) -> None:
    @adapter("SophiaVL-R1", f"{kind}_compute_score")
    def outcome(inputs, compat="upstream"):
        solution = inputs["ground_truth"]
        return one(f"sophiavl_r1/{kind}", inputs["predict"], compat, solution=solution)


for _kind in ("math", "choices", "ocr", "free_form"):
    _sophiavl(_kind)
