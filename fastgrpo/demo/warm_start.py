# SPDX-License-Identifier: Apache-2.0
"""The short supervised run GRPO starts from: `python -m fastgrpo.demo.warm_start --out DIR`, packed
as the package carries it (`fastgrpo.checkpoints.packed`).

It teaches the format, to read, and where things are roughly: every edge of a box it shows is off by
up to JITTER pixels, so the policy ends up sampling boxes around the digit, and sharpening them is
left to the rewards. One thread and a fixed seed: the same command gives the same weights, bit for
bit, on the same kind of CPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import PreTrainedModel, ProcessorMixin

from fastgrpo.checkpoints.packed import pack
from fastgrpo.demo import data
from fastgrpo.demo.model import CELLS, build_model, build_processor
from fastgrpo.losses.tokens import IGNORE

SEED = 0
STEPS = 1000
BATCH_SIZE = 32
JITTER = 8
WARMUP_STEPS, COOLDOWN_SHARE = 50, 0.4
# In 300 steps Muon finds the look-up "which image token shows a 7" (89 % of the cells are right);
# AdamW alone is then still near chance.
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 2e-3, 0.01
# Bits of a stored weight, its leading one among them: of bf16's eight, a package would carry three
# that hardly compress.
SIGNIFICANT_BITS = 5


@dataclass(frozen=True)
class Batch:
    """`targets` (B, L): the token wanted after each position, or IGNORE. `image` (B, L) marks the
    image's positions; `digits` and `places`, one per marked position, index READINGS and CELLS.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    image: Tensor
    digits: Tensor
    places: Tensor


READINGS = (*map(str, range(10)), "?")  # what a cell can show; "?" is blank paper


def jittered(box: data.Box, rng: np.random.Generator) -> data.Box:
    """`box` with every edge moved by up to JITTER pixels, still a box of at least one pixel."""
    x1, y1, x2, y2 = (int(v) for v in np.array(box) + rng.integers(-JITTER, JITTER + 1, size=4))
    limit = data.CELL * data.MAX_CELLS
    x1, y1 = min(max(x1, 0), limit - 1), min(max(y1, 0), limit - 1)
    return x1, y1, min(max(x2, x1 + 1), limit), min(max(y2, y1 + 1), limit)


def make_batch(processor: ProcessorMixin, rng: np.random.Generator, batch_size: int) -> Batch:
    scenes = [data.draw_scene(rng, "train") for _ in range(batch_size)]
    chats = []
    for scene in scenes:
        told = data.answer(scene.digit, scene.box, jittered(scene.box, rng))
        chats.append([data.user_turn(scene.question), {"role": "assistant", "content": told}])
    inputs = processor(
        text=processor.apply_chat_template(chats, tokenize=False),
        images=[scene.image for scene in scenes],
        padding=True,
        return_tensors="pt",
    )
    token_id = processor.tokenizer.convert_tokens_to_ids
    ids, following = inputs["input_ids"], inputs["input_ids"].roll(-1, dims=1)
    completion = (ids == token_id("<think>")).cumsum(1) > 0
    targets = torch.where(completion.roll(-1, dims=1), following, IGNORE)
    targets[:, -1] = IGNORE
    # The first digit of a row is the question's: there the place is asked for, as after the
    # thought's digit.
    numbers = torch.isin(ids, torch.tensor(token_id(list(READINGS[:10]))))
    places = torch.isin(ids, torch.tensor(token_id(list(CELLS))))
    targets[torch.arange(batch_size), numbers.int().argmax(1)] = ids[places]
    cells = [np.argwhere(np.ones_like(scene.cells)) @ (data.MAX_CELLS, 1) for scene in scenes]
    digits = np.concatenate([scene.cells.ravel() for scene in scenes])
    return Batch(
        inputs,
        targets,
        image=ids == token_id("<|image_pad|>"),
        digits=torch.from_numpy(np.where(digits < 0, READINGS.index("?"), digits)),
        places=torch.from_numpy(np.concatenate(cells)),
    )


def loss_of(model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> Tensor:
    """Next-token loss of the completions, and at image positions: which digit is here, and which
    cell is this.
    """
    logits = model(**batch.inputs, use_cache=False).logits
    wanted = batch.targets != IGNORE
    seen = logits[batch.image]
    token_id = processor.tokenizer.convert_tokens_to_ids
    return (
        cross_entropy(logits[wanted], batch.targets[wanted])
        + cross_entropy(seen[:, token_id(list(READINGS))], batch.digits)
        + cross_entropy(seen[:, token_id(list(CELLS))], batch.places)
    )


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embeddings, AdamW for embeddings, patches, norms and biases."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(hidden, lr=MUON_RATE, momentum=0.95, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]


def train(
    steps: int, batch_size: int = BATCH_SIZE, seed: int = SEED
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The policy after `steps` supervised steps, and its processor."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    processor = build_processor()
    model = build_model(processor.tokenizer).train()
    both = optimizers(model)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, (steps - step) / (steps * COOLDOWN_SHARE), 1.0)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in both]
    bar = trange(steps, desc="warm start", mininterval=5)
    for _ in bar:
        loss = loss_of(model, processor, make_batch(processor, rng, batch_size))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval(), processor


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> None:
    """Every weight to the nearest number of SIGNIFICANT_BITS, which bf16 holds exactly."""
    for weight in model.parameters():
        mantissa, exponent = torch.frexp(weight)
        rounded = (mantissa * 2**SIGNIFICANT_BITS).round()
        weight.copy_(torch.ldexp(rounded, exponent - SIGNIFICANT_BITS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model, processor = train(args.steps)
    round_weights(model)
    # Half the bytes; GRPO loads it in float32.
    model.to(torch.bfloat16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    pack(args.out)
    size = sum(p.numel() for p in model.parameters())
    print(f"warm start: {args.steps} steps, {size:,} parameters, in {args.out}")


if __name__ == "__main__":
    main()
