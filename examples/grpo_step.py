# SPDX-License-Identifier: Apache-2.0
"""GRPO without a trainer: sample, reward, step.

    python examples/grpo_step.py --model Qwen/Qwen2.5-VL-3B-Instruct --steps 100
    python examples/grpo_step.py --tiny --steps 2          # seconds on a CPU

The policy is asked where a digit stands in an image of two; the reward is the IoU of its box.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import fastgrpo as fg

SIDE, HALF = 112, 56
IOU = fg.rewards.get("vlm_r1/iou", answer_frame="image", solution_frame="image")


def draw(rng: random.Random) -> tuple[Image.Image, str, str]:
    """An image with a digit in each half, the question, and the box of the digit asked for."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    digits = rng.sample(range(10), 2)
    boxes = []
    for half, digit in enumerate(digits):
        x, y = rng.randrange(4, 80), HALF * half + rng.randrange(4, 28)
        ImageDraw.Draw(image).text((x, y), str(digit), fill="navy", font_size=24)
        boxes.append(list(ImageDraw.Draw(image).textbbox((x, y), str(digit), font_size=24)))
    question = f"Where is the {digits[0]}? Answer with a box in JSON: [x1, y1, x2, y2]."
    return image, question, str([round(side) for side in boxes[0]])


def group_of(processor, image: Image.Image, question: str) -> fg.Group:
    """A prompt with its image as the engine takes it, without completions."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    vision = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    return fg.Group(inputs["input_ids"][0], [], vision)


def rewards_of(processor, group: fg.Group, solution: str, reward: Callable) -> torch.Tensor:
    """What `reward` pays each completion; NaN where it could not be scored."""
    texts = processor.batch_decode(group.completions, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    scores = reward(prompts=texts, completions=completions, solution=[solution] * len(texts))
    return torch.tensor([float("nan") if score is None else score for score in scores])


def main(
    arguments: list[str] | None = None, draw=draw, group_of=group_of, reward=IOU
) -> list[dict[str, float]]:
    """Trains on tasks of `draw`, prompts by `group_of`, paid by `reward`; each step's metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args(arguments)
    if args.tiny:
        from fastgrpo.testing.trl import save_checkpoint

        args.model = str(save_checkpoint(Path(tempfile.mkdtemp())))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    step = fg.GRPOStep(model, fg.Objective(loss_type="dapo"))
    rng, log = random.Random(0), []
    for number in range(args.steps):
        tasks = [draw(rng) for _ in range(args.prompts)]
        asked = [group_of(processor, seen, question) for seen, question, _ in tasks]
        groups = fg.generate(
            model, asked, args.generations, max_new_tokens=args.max_new_tokens, seed=number
        )
        pairs = zip(groups, tasks, strict=True)
        rewards = [rewards_of(processor, group, right, reward) for group, (*_, right) in pairs]
        advantages = fg.group_advantages(torch.cat(rewards), args.generations)
        for group, own in zip(groups, advantages.split(args.generations), strict=True):
            group.advantages = own
        metrics = step(groups)  # adds the gradients of the whole batch to .grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics["reward"] = torch.cat(rewards).nanmean().item()
        log.append(metrics)
        print(
            f"{number + 1}/{args.steps}  reward {metrics['reward']:.3f}  loss {metrics['loss']:.4f}"
        )
    return log


if __name__ == "__main__":
    main()
