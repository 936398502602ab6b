# SPDX-License-Identifier: Apache-2.0
"""Every reward that compares boxes: an answer, a solution, and what a moved box is worth."""

import json

SIZE, SEEN = (320, 240), (448, 280)  # width and height; resized by 1.4 and by 7 / 6
BOX, MOVED = [80, 60, 160, 180], [120, 60, 200, 180]  # moved by half its width: IoU 1 / 3
FAR = [200, 30, 300, 90]
STATED = ("image", "seen", "thousandths", "unit", "thousandths_yx")


def by_hand(box, frame, size=SIZE, seen=SEEN):
    """A box in pixels of the image as it reads in another frame."""
    x1, y1, x2, y2 = box
    width, height = size
    across, down = {
        "image": (1, 1),
        "seen": (seen[0] / width, seen[1] / height),
        "thousandths": (1000 / width, 1000 / height),
        "thousandths_yx": (1000 / width, 1000 / height),
        "unit": (1 / width, 1 / height),
    }[frame]
    scaled = [x1 * across, y1 * down, x2 * across, y2 * down]
    return [scaled[i] for i in (1, 0, 3, 2)] if frame.endswith("_yx") else scaled


def listed(boxes):
    return json.dumps([{"bbox_2d": box, "label": f"c{i}"} for i, box in enumerate(boxes)])


def answered(content):
    return f"<think>\nt\n</think>\n<answer>\n{content}\n</answer>"


def one_box(boxes):
    return answered(json.dumps({"bbox_2d": boxes[0]}))


def detections(boxes):
    return answered(f"```json\n{listed(boxes)}\n```")


def positions(boxes):
    return answered(str([{"Position": box, "Confidence": 1.0} for box in boxes]))


def looked(boxes):
    return f"<look>{listed(boxes)}</look>{detections(boxes)}"


def objects(boxes):
    return [{"bbox_2d": b, "point_2d": [(b[0] + b[2]) / 2, (b[1] + b[3]) / 2]} for b in boxes]


def thought_twice(boxes):
    items = json.dumps([{**item, "affordance": ""} for item in objects(boxes)])
    return f"<think>t</think><rethink>r</rethink><answer>{items}</answer>"


def pairs(boxes):
    return [[f"c{i}", box] for i, box in enumerate(boxes)]


LOW = {"iou_threshold": 0.3}
# name, settings, columns, what an answer and a solution look like, value of the two boxes with the
# first one moved by half its width (its IoU and GIoU are 1 / 3).
TABLE = [
    ("vlm_r1/iou", {}, {}, one_box, lambda b: b[0], 1 / 3),
    ("vlm_r1/iou_internvl", {}, {}, one_box, lambda b: json.dumps(b[0]), 1 / 3),
    ("vlm_r1/iou_glm", {}, {}, one_box, lambda b: f"<answer>{b[0]}</answer>", 1 / 3),
    ("vlm_r1/map", {}, {}, detections, detections, 1 / 2),
    ("vlm_r1/map50", {}, {}, detections, detections, 1 / 2),
    ("vlm_r1/od_ap", {}, {}, detections, detections, 1 / 2),
    ("vlm_r1/od_ap50", {}, {}, detections, detections, 1 / 2),
    ("vlm_r1/od_length", {}, {}, detections, detections, 1 / 2),
    ("vlm_r1/odLength", {}, {}, detections, detections, 1 / 2),
    ("vlm_r1/weighted_sum", LOW, {}, detections, detections, 0.7 * (1 / 3 + 1) / 2 + 0.3),
    ("vlm_r1/accuracy", {}, {"accu_reward_method": "od_ap"}, detections, detections, 1 / 2),
    ("vlm_r1/cosine_accuracy", {}, {"completion_ids": []}, detections, detections, 0.0),
    ("visual_rft/iou", LOW, {}, positions, positions, (1 / 3 + 1) / 2),
    ("visual_rft/confidence", {}, {}, positions, positions, 1 / 2),
    ("visual_rft/giou", {}, {}, one_box, lambda b: f"<answer>{b[0]}</answer>", 4 / 3),
    ("v_triune/detection", {"iou_threshold": 0.5}, {}, lambda b: answered(listed(b)),
     lambda b: answered(listed(b)), 0.7 / 2 + 0.3 / 2),
    ("v_triune/total", {"iou_threshold": 0.5}, {}, lambda b: answered(listed(b)),
     lambda b: answered(listed(b)), (0.5 + 0.1) / 1.1),
    ("vision_r1/precision", {}, {}, listed, pairs, (1 / 3 + 1) / 2),
    ("vision_r1/recall", {}, {}, listed, pairs, 1 / 2),
    ("perception_r1/grounding", {}, {}, one_box, lambda b: b[0], 1 / 9),
    ("curr_reft/stage3", {}, {"task": "detection"}, one_box,
     lambda b: f"<answer>{b[0]}</answer>", 0.0),
    ("affordance_r1/accuracy", {}, {}, thought_twice, objects, 3 / 2),
    ("affordance_r1/total", {}, {}, thought_twice, lambda b: json.dumps(objects(b)),
     4 + 3 / 2 + 3),
    ("dip_r1/precision_recall", {}, {}, detections, detections, 1 / 2),
    ("dip_r1/look", {}, {}, looked, detections, 1 / 2),
    ("grip/weighted_iou", {}, {}, detections, detections, (1 / 3 + 1) / 2),
    ("vlaa_thinking/rule", {}, {"problem_type": "iou"}, one_box, lambda b: b[0], 1 / 3),
]  # fmt: skip
