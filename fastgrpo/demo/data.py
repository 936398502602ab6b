# SPDX-License-Identifier: Apache-2.0
"""Real handwriting to point at: scikit-learn's digits on canvases of varying resolution.

A canvas is white paper of 2 to 4 by 2 to 4 cells of 28 pixels. Every digit lies at a random place
inside its own cell, in a random size and ink, and no two digits of a canvas are the same, so "find
the 7" has one answer: the tight box around the ink. Sides are multiples of 28, so the Qwen2.5-VL
image processor never resizes and a box in the model's coordinates is a box in pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CELL = 28
MIN_CELLS, MAX_CELLS = 2, 4
MAX_DIGITS = 8
MIN_HEIGHT, MAX_HEIGHT = 14, 24
QUESTIONS = ("find the {}", "where is the {}?", "point at the {}")
INKS = ((20, 20, 40), (20, 40, 150), (150, 20, 30), (10, 95, 50), (90, 30, 120))
IMAGE_MARK = "<image>"
HELD_OUT_SHARE = 4  # every fourth source digit is kept for evaluation

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """One canvas and what is asked about it; `box` is (x1, y1, x2, y2) in pixels, the right and
    bottom excluded.
    """

    image: Image.Image
    question: str
    digit: int
    box: Box
    cells: np.ndarray  # (rows, columns) of digits, -1 where the paper is blank


@cache
def source_digits(split: str) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The handwritten digits of "train" or "heldout", cropped to their ink, and their labels.

    The splits share no source digit.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split is "train" or "heldout", not {split!r}')
    from sklearn.datasets import load_digits

    bundle = load_digits()
    held_out = np.arange(len(bundle.target)) % HELD_OUT_SHARE == 0
    rows = np.flatnonzero(held_out if split == "heldout" else ~held_out)
    return tuple(_crop_to_ink(bundle.images[row]) for row in rows), bundle.target[rows]


def _crop_to_ink(digit: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(digit)
    crop = digit[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return (crop * (255 / 16)).round().astype(np.uint8)


def draw_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draws one canvas from `rng` with digits of `split`."""
    digits, labels = source_digits(split)
    rows, columns = rng.integers(MIN_CELLS, MAX_CELLS + 1, size=2)
    count = rng.integers(2, min(rows * columns, MAX_DIGITS) + 1)
    cells = rng.choice(rows * columns, size=count, replace=False)
    wanted = rng.choice(10, size=count, replace=False)
    canvas = np.full((rows * CELL, columns * CELL, 3), 255, dtype=np.uint8)
    grid = np.full((rows, columns), -1)
    boxes = []
    for label, cell in zip(wanted, cells, strict=True):
        source = digits[rng.choice(np.flatnonzero(labels == label))]
        ink = _resize(source, rng.integers(MIN_HEIGHT, MAX_HEIGHT + 1))
        height, width = ink.shape
        y = CELL * (cell // columns) + rng.integers(CELL - height + 1)
        x = CELL * (cell % columns) + rng.integers(CELL - width + 1)
        cover = ink[..., None] / 255
        colour = np.array(INKS[rng.integers(len(INKS))])
        canvas[y : y + height, x : x + width] = (255 - cover * (255 - colour)).round()
        grid[divmod(cell, columns)] = label
        boxes.append((int(x), int(y), int(x + width), int(y + height)))
    # The first digit drawn is the one asked for: cells and labels are already in random order.
    question = QUESTIONS[rng.integers(len(QUESTIONS))].format(wanted[0])
    return Scene(Image.fromarray(canvas), question, int(wanted[0]), boxes[0], grid)


def _resize(digit: np.ndarray, height: int) -> np.ndarray:
    """Scales to `height`, keeping the aspect ratio as far as the cell is wide."""
    width = min(max(1, round(digit.shape[1] * height / digit.shape[0])), CELL)
    image = Image.fromarray(digit).resize((width, int(height)), Image.Resampling.BILINEAR)
    return np.asarray(image)


def user_turn(question: str) -> dict:
    """The message that shows the canvas and asks for a digit."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def cell_name(row: int, column: int) -> str:
    """As in a spreadsheet: a letter for the column, a number for the row."""
    return f"{'ABCD'[column]}{row + 1}"


def answer(digit: int, box: Box, told: Box | None = None) -> str:
    """A completion for `digit` at `box`: its cell as the thought, then `told` (default: `box`) as
    the answer.
    """
    cell = cell_name(box[1] // CELL, box[0] // CELL)
    numbers = ",".join(map(str, told or box))
    return f"<think>{digit} {cell}</think><answer>[{numbers}]</answer>"


def write_split(folder: Path, split: str, num_samples: int, seed: int) -> Path:
    """Writes PNG files and VLM-R1 JSONL, one line per sample; returns the JSONL's path."""
    rng = np.random.default_rng([seed, split == "heldout"])
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num_samples):
        scene = draw_scene(rng, split)
        name = f"{split}_{index:05d}.png"
        scene.image.save(images / name)
        lines.append(
            json.dumps(
                {
                    "id": index,
                    "image": name,
                    "conversations": [
                        {"from": "human", "value": IMAGE_MARK + scene.question},
                        {"from": "gpt", "value": json.dumps(scene.box)},
                    ],
                    "accu_reward_method": "iou",
                }
            )
        )
    path = folder / f"{split}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
