# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo init DIR [--model NAME]`: a commented config, two rows and a reward that train at once.

Without --model the policy is the demo's, a million parameters, copied into DIR: seconds on a CPU.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastgrpo.checkpoints.packed import unpack
from fastgrpo.errors import InputError

SIDE, FONT_SIZE = 112, 24
ROWS = ((7, (10, 16), 3, (70, 66)), (3, (12, 70), 8, (68, 12)))  # asked for and where, another

CONFIG = """\
# Settings of `fastgrpo train --config {folder}/config.yaml`, from the folder where init was called.
# Any of TRL's GRPOConfig and ModelConfig fields may stand here; the command line overrides them.

# The policy: a folder or a name on the hub, such as Qwen/Qwen2.5-VL-3B-Instruct.
model_name_or_path: {model}
output_dir: {folder}/run

# One JSON object a line: "image" (name or list), "conversations" (question with one <image> per
# image, answer). Images are files below image_folders.
data_file_paths: {folder}/rows.jsonl
image_folders: {folder}/images
# What surrounds a question. Leave it out to ask for <think> ... </think><answer> ... </answer>.
question_template: "{{Question}}"

# file.py:function, or names of `fastgrpo.rewards.names()`; their sum is the reward.
reward_funcs: ["{folder}/reward.py:closeness", vlm_r1/format]

num_generations: 4 # completions of a prompt that are compared with each other
per_device_train_batch_size: 8 # completions: 2 prompts x 4
max_completion_length: 24
max_steps: 4
learning_rate: {rate}
beta: 0.0 # weight of the KL to the starting policy
logging_steps: 1
log_completions: true # kept for `fastgrpo report {folder}/run`
num_completions_to_print: 0
save_strategy: "no"
"""

REWARD = '''\
"""A reward: one number per completion, higher is better; None leaves a sample out."""

import re


def closeness(completions, solution, **columns):
    """1 for the very box, less by the mean distance of its sides in pixels."""
    rewards = []
    for completion, truth in zip(completions, solution):
        said, box = (re.findall(r"[0-9]+", text)[-4:] for text in (completion[0]["content"], truth))
        off = sum(abs(int(a) - int(b)) for a, b in zip(said, box)) / 4
        rewards.append(max(0.0, 1 - off / 100) if len(said) == 4 else 0.0)
    return rewards
'''


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastgrpo init", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--model", help="the policy (default: a tiny one, copied into DIR)")
    args = parser.parse_args(arguments)
    write(args.folder, args.model)
    print(f"{args.folder}: config.yaml, rows.jsonl, images, reward.py. Next:")
    for command in ("check", "train"):
        print(f"  fastgrpo {command} --config {args.folder}/config.yaml")
    print(f"  fastgrpo report {args.folder}/run")
    print(f"  fastgrpo eval --config {args.folder}/config.yaml")


def write(folder: Path, model: str | None = None) -> None:
    """Fills `folder`; raises `InputError` if it is a file or holds something."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"DIR: {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"DIR: {folder} is not empty")
    (folder / "images").mkdir(parents=True)
    lines = []
    for index, (digit, place, other, other_place) in enumerate(ROWS):
        canvas = Image.new("RGB", (SIDE, SIDE), "white")
        box = _draw(canvas, digit, place)
        _draw(canvas, other, other_place)
        canvas.save(folder / "images" / f"{index}.png")
        turns = [
            {"from": "human", "value": f"<image>find the {digit}"},
            {"from": "gpt", "value": json.dumps(box)},
        ]
        lines.append(json.dumps({"id": index, "image": f"{index}.png", "conversations": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(REWARD)
    if model is None:
        unpack(files("fastgrpo.demo") / "warm_start", folder / "model")
    settings = {"model": model or f"{folder}/model", "rate": "1.0e-6" if model else "5.0e-4"}
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder, **settings))


def _draw(canvas: Image.Image, digit: int, place: tuple[int, int]) -> list[int]:
    """Writes the digit there; returns the box around its ink."""
    ink = Image.new("L", canvas.size, 0)
    font = ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(ink).text(place, str(digit), fill=255, font=font)
    canvas.paste((20, 40, 150), mask=ink)
    return list(ink.getbbox())
