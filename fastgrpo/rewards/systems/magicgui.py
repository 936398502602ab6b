# SPDX-License-Identifier: Apache-2.0
"""MagicGUI's action reward, by the rules of its evaluation code (MagicAgent-GUI/MagicGUI@48b3f94).

The training reward is known by abstract only (type and position of an action); the weights of the
two parts are our own reading.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.geometry.frames import RowFrames
from fastgrpo.rewards.read.boxes import finite_point
from fastgrpo.rewards.read.faults import BadColumn, Unscorable
from fastgrpo.rewards.read.items import loads
from fastgrpo.rewards.read.tags import fenced_json, last_answer

SOURCE = "MagicAgent-GUI/MagicGUI@48b3f94 (evaluation), our own reading of the training reward"
TAP_DISTANCE = 0.14  # of the screen
BOX_GROWTH = 1.2
LONG_PRESS_MS = 200
STOPS = ("finish", "satisfied", "impossible", "interrupt", "need_feedback")


def read_action(text: str, frames: RowFrames) -> tuple[str, Any]:
    """(type, argument) of the JSON action in the last answer; points are shares of the screen."""
    text = last_answer(text)
    block = fenced_json(text)
    action = loads((text if block is None else block).strip())
    if not isinstance(action, dict):
        raise Unscorable("not_an_object")
    duration = action.get("duration", LONG_PRESS_MS)
    if action.get("STATUS") in STOPS:
        return "stop", None
    if isinstance(action.get("TYPE"), str):
        return "type", action["TYPE"]
    if "POINT" in action:
        point = _point(action["POINT"], frames)
        if "to" in action:
            return "scroll", _direction(point, action["to"], frames)
        return ("long_point" if duration > LONG_PRESS_MS else "click"), point
    if isinstance(action.get("PRESS"), str):
        return "press", action["PRESS"].lower()
    if "duration" in action:
        return "wait", None
    raise Unscorable("unknown_action")


def _point(point: Any, frames: RowFrames) -> list[float]:
    if not finite_point(point):
        raise Unscorable("bad_point")
    return frames.answer_in("unit", np.array(point, dtype=np.float64)).tolist()


def _direction(start: list[float], to: Any, frames: RowFrames) -> str:
    if isinstance(to, str):
        return to
    x, y = _point(to, frames)
    dx, dy = x - start[0], y - start[1]
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def text_f1(said: str, truth: str) -> float:
    """F1 of the sets of lower-case words; 1 when two single words contain each other."""
    said, truth = (set(s.lower().replace("[", "").replace("]", "").split()) for s in (said, truth))
    if len(said) == len(truth) == 1:
        (a,), (b,) = said, truth
        if a in b or b in a:
            return 1.0
    common = len(said & truth)
    return 2 * common / (len(said) + len(truth)) if common else 0.0


FRAMES = {"answer_frame": "thousandths", "solution_frame": "unit"}


def _truth(*, solution, frames, **columns) -> str:
    kind, point = solution["type"], solution.get("point")
    if point is not None:
        point = np.asarray(frames.to_answer(np.array(point, dtype=np.float64))).tolist()
    action = {
        "click": {"POINT": point},
        "long_point": {"POINT": point, "duration": 5 * LONG_PRESS_MS},
        "scroll": {"POINT": [0, 0], "to": solution.get("direction")},
        "type": {"TYPE": solution.get("text")},
        "press": {"PRESS": solution.get("button")},
        "wait": {"duration": LONG_PRESS_MS},
        "stop": {"STATUS": STOPS[0]},
    }
    return json.dumps(action[kind])


@reward("magicgui/action", columns=("solution",), source=SOURCE, framed=FRAMES, truth=_truth)
def action_reward(
    text: str, *, solution: dict[str, Any], frames: RowFrames, type_weight: float = 0.5
) -> float:
    """w [type right] + (1 - w) [argument right].

    The solution has "type" (click, long_point, scroll, type, press, wait, stop) and "point" (x, y)
    with "boxes" ([y, x, height, width]), both in shares of the screen, "direction", "text" or
    "button"; the answer's points are in thousandths. A point is right inside a box around the true
    point, grown by a fifth, or within 0.14 of the screen; a text with word F1 >= 0.5. Rules from
    `evaluator_honor.py`; w = 0.5 is ours. Both modes the same.
    """
    kind = solution.get("type") if isinstance(solution, dict) else None
    if kind not in ("click", "long_point", "scroll", "type", "press", "wait", "stop"):
        raise BadColumn(f"solution: action type {kind!r}")
    said, argument = read_action(text, frames)
    if said != kind:
        return 0.0
    return type_weight + (1 - type_weight) * _argument_right(kind, argument, solution, frames)


def _argument_right(kind: str, argument: Any, solution: dict[str, Any], frames: RowFrames) -> bool:
    if kind in ("click", "long_point"):
        point = frames.solution_in("unit", np.array(solution["point"], dtype=np.float64))
        boxes = [_in_shares(box, frames) for box in solution.get("boxes") or []]
        return _hits(argument, point, boxes)
    if kind == "scroll":
        return argument == solution["direction"]
    if kind == "type":
        return text_f1(argument.strip()[:8192], solution["text"].strip()) >= 0.5
    return kind != "press" or argument == solution["button"].lower()


def _in_shares(box, frames: RowFrames) -> list[float]:
    y, x, height, width = box
    left, top, right, bottom = frames.solution_in("unit", [x, y, x + width, y + height])
    return [top, left, bottom - top, right - left]


def _hits(point, truth, boxes) -> bool:
    grown = [_grow(box) for box in boxes]
    around = [box for box in grown if _inside(truth, box)]
    near = math.dist(point, truth) <= TAP_DISTANCE
    return near or any(_inside(point, box) for box in around)


def _grow(box) -> list[float]:
    y, x, height, width = box
    more = BOX_GROWTH - 1
    return [
        max(0, y - more * height / 2),
        max(0, x - more * width / 2),
        min(1, height * BOX_GROWTH),
        min(1, width * BOX_GROWTH),
    ]


def _inside(point, box) -> bool:
    y, x, height, width = box
    return x <= point[0] <= x + width and y <= point[1] <= y + height
