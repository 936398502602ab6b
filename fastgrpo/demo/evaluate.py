# SPDX-License-Identifier: Apache-2.0
"""Held-out figures of a policy: mean IoU of sampled and of greedy completions.

`python -m fastgrpo.demo.evaluate MODEL DATA.jsonl` prints them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from fastgrpo import rewards
from fastgrpo.demo.data import IMAGE_MARK, user_turn
from fastgrpo.images import load_image

MAX_NEW_TOKENS = 24
BATCH_SIZE = 256


@dataclass(frozen=True)
class HeldOut:
    """Mean IoU at temperature 1 and greedy, the share of well-formed samples, and over how many
    images.
    """

    sampled_iou: float
    greedy_iou: float
    sampled_format: float
    num_images: int


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a VLM-R1 file with their images opened, as {image, question, box}."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        question, box = (turn["value"] for turn in row["conversations"])
        rows.append(
            {
                "image": load_image(path.parent / "images" / row["image"]),
                "question": question.removeprefix(IMAGE_MARK),
                "box": json.loads(box),
            }
        )
    return rows


@torch.no_grad()
def complete(
    model: PreTrainedModel, processor: ProcessorMixin, rows: list[dict], *, sample: bool
) -> list[str]:
    """One completion per row, drawn at temperature 1 from torch's generator, or greedy."""
    tokenizer = processor.tokenizer
    # Every field is explicit: a checkpoint's own generation_config must not change the measurement.
    settings = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=sample,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        prompts = [[user_turn(row["question"])] for row in batch]
        inputs = processor(
            text=processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False),
            images=[row["image"] for row in batch],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs.to(model.device), generation_config=settings)
        completions = ids[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return texts


def evaluate(
    model: PreTrainedModel, processor: ProcessorMixin, path: Path, seed: int = 0
) -> HeldOut:
    """Measures `model` on the file at `path`; the samples are reproducible by `seed`."""
    rows = read_jsonl(path)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sampled = complete(model, processor, rows, sample=True)
    greedy = complete(model, processor, rows, sample=False)
    model.train(was_training)
    boxes = [row["box"] for row in rows]
    iou, well_formed = rewards.get("vlm_r1/iou"), rewards.get("vlm_r1/format")

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return HeldOut(
        sampled_iou=mean(iou(completions=sampled, solution=boxes)),
        greedy_iou=mean(iou(completions=greedy, solution=boxes)),
        sampled_format=mean(well_formed(completions=sampled)),
        num_images=len(rows),
    )


def load(folder: Path | str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The policy in `folder` in float32, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    print(json.dumps(asdict(evaluate(*load(args.model), args.data))))


if __name__ == "__main__":
    main()
