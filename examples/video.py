# SPDX-License-Identifier: Apache-2.0
"""GRPO on videos, by the loop of grpo_step.py: TRL's trainer hands no videos to a model.

    python examples/video.py --model Qwen/Qwen2.5-VL-3B-Instruct --steps 100
    python examples/video.py --tiny --steps 2          # seconds on a CPU

The policy is asked where a square goes; the reward compares its answer with the right word.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import grpo_step
import torch
from PIL import Image, ImageDraw

import fastgrpo as fg

FRAMES, FPS, SIDE, STEP = 8, 2.0, 112, 6
WAYS = {"left": (-STEP, 0), "right": (STEP, 0), "up": (0, -STEP), "down": (0, STEP)}
VIDEO = "<|video_pad|>"  # Qwen's token of a patch, one for each of the tower's features
PLACE = f"<|vision_start|>{VIDEO}<|vision_end|>"


def draw(rng: random.Random) -> tuple[list[Image.Image], str, str]:
    """The frames of a clip, the question, and the way the square goes."""
    way = rng.choice(list(WAYS))
    x, y = rng.randrange(48, 56), rng.randrange(48, 56)
    frames = []
    for _ in range(FRAMES):
        frames.append(Image.new("RGB", (SIDE, SIDE), "white"))
        ImageDraw.Draw(frames[-1]).rectangle((x, y, x + 12, y + 12), fill="navy")
        x, y = x + WAYS[way][0], y + WAYS[way][1]
    question = "Which way does the square go: left, right, up or down? Answer with one word."
    return frames, question, way


def video_inputs(image_processor, frames: Sequence[Image.Image], fps: float) -> dict:
    """Frames of one size as the tower takes a video: a patch spans `temporal_patch_size` of them.

    The image processor repeats an image over that time; a video has the next frame there. It is
    what Qwen2.5-VL's own video processor makes of frames it need not resize, without torchvision.
    """
    span = image_processor.temporal_patch_size
    read = image_processor(list(frames), return_tensors="pt")
    height, width = read["image_grid_thw"][0, 1:].tolist()
    steps = len(frames) // span
    patches = read["pixel_values"].view(steps, span, height * width, 3, span, -1)
    moving = torch.stack([patches[:, t, :, :, t] for t in range(span)], dim=3)
    return {
        "pixel_values_videos": moving.reshape(steps * height * width, -1),
        "video_grid_thw": torch.tensor([[steps, height, width]]),
        "second_per_grid_ts": torch.tensor([span / fps]),
    }


def group_of(processor, frames: Sequence[Image.Image], question: str) -> fg.Group:
    """A prompt with its video as the engine takes it, without completions."""
    vision = video_inputs(processor.image_processor, frames, FPS)
    text = processor.apply_chat_template(
        [{"role": "user", "content": PLACE + question}], add_generation_prompt=True, tokenize=False
    )
    features = int(vision["video_grid_thw"].prod()) // processor.image_processor.merge_size**2
    ids = processor.tokenizer(text.replace(VIDEO, VIDEO * features))["input_ids"]
    return fg.Group(torch.tensor(ids), [], vision)


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    return grpo_step.main(arguments, draw, group_of, fg.rewards.get("vlm_r1/accuracy"))


if __name__ == "__main__":
    main()
