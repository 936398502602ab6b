# SPDX-License-Identifier: Apache-2.0
"""DAPO's dynamic sampling: groups without a gradient are replaced by groups of fresh prompts.

Letters: B rows of a process, G completions per prompt, P and C prompt and completion columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from trl.trainer.utils import split_pixel_values_by_grid
from trl.trainer.utils import unsplit_pixel_values_by_grid as unsplit_pixel_values

from fastgrpo.errors import InputError
from fastgrpo.integrations.trl.batches import loss_mask, take_rows

WHOLE_ROW = ("mm_token_type_ids", "token_type_ids")  # (B, P + C)


class ResamplingMixin:
    """Samples up to `fast.max_generation_batches` batches for one, until its groups are all alive.

    A group is dead when every advantage in it is exactly 0 or none of its tokens counts. Fresh
    prompts are drawn from the training data by (seed, step, batch), so that a resumed run draws
    the same; all processes sample together until each one's batch is full or the bound is met,
    and places still free keep their dead groups. Logged: `fastgrpo/generation_batches` (sampled
    for this one), `fastgrpo/replaced_groups` and `fastgrpo/dead_groups` (left in the batch).
    Source: Yu et al., DAPO (arXiv 2503.14476), section 3.2.
    """

    def _check_resampling(self) -> None:
        if self.fast.max_generation_batches < 1:
            raise InputError(
                "max_generation_batches: expected at least 1, got "
                f"{self.fast.max_generation_batches}"
            )
        if self.fast.max_generation_batches > 1 and self.scale_rewards == "batch":
            raise InputError(
                "max_generation_batches: advantages scaled over the batch (scale_rewards) depend "
                "on the groups that are replaced; use group or none"
            )

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._mode != "train" or self.fast.max_generation_batches == 1:
            return output
        size, rows = self.num_generations, len(output["completion_ids"])
        if rows % size:
            raise InputError(
                f"max_generation_batches: a process holds {rows} completions, which is not whole "
                f"groups of {size}; make per_device_train_batch_size times accumulation fit"
            )
        batches, alive = [split_pixel_values_by_grid(output)], _alive(output, size)
        chosen = [(0, group) for group in alive]
        wanted = rows // size
        while len(batches) < self.fast.max_generation_batches:
            if not self._on_any_process(len(chosen) < wanted):
                break
            fresh = self._fresh_rows(len(batches), wanted)
            more = super()._generate_and_score_completions(fresh)
            chosen += [(len(batches), group) for group in _alive(more, size)]
            batches.append(split_pixel_values_by_grid(more))
        chosen = chosen[:wanted]
        dead = [(0, group) for group in range(wanted) if group not in alive]
        places = chosen + dead[: wanted - len(chosen)]
        self._count_resampling(len(batches), len(chosen) - len(alive), wanted - len(chosen))
        if len(batches) == 1:
            return output
        parts = [
            take_rows(batches[batch], list(range(group * size, (group + 1) * size)))
            for batch, group in places
        ]
        merged = unsplit_pixel_values(merge(parts, self._tokenizer.pad_token_id))
        counted = self.accelerator.gather(loss_mask(merged).sum()).sum()
        return merged | {"num_items_in_batch": counted}

    def _fresh_rows(self, batch: int, num_groups: int) -> list[dict]:
        """`num_groups` prompts of this process, each G times; other processes have other ones."""
        part = self._step % self.args.gradient_accumulation_steps
        draw = np.random.default_rng([self.args.seed, self.state.global_step, part, batch])
        count = num_groups * self.accelerator.num_processes
        rows = draw.choice(
            len(self.train_dataset), count, replace=count > len(self.train_dataset)
        ).tolist()
        first = num_groups * self.accelerator.process_index
        own = [self.train_dataset[row] for row in rows[first : first + num_groups]]
        return [row for row in own for _ in range(self.num_generations)]

    def _on_any_process(self, value: bool) -> bool:
        flag = torch.tensor([value], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def _count_resampling(self, batches: int, replaced: int, dead: int) -> None:
        counts = torch.tensor([[replaced, dead]], device=self.accelerator.device)
        replaced, dead = self.accelerator.gather(counts).sum(0).tolist()
        metrics = self._metrics["train"]
        metrics["fastgrpo/generation_batches"].append(float(batches))
        metrics["fastgrpo/replaced_groups"].append(float(replaced))
        metrics["fastgrpo/dead_groups"].append(float(dead))


def _alive(output: dict, size: int) -> list[int]:
    """The groups of G consecutive rows with a gradient of their own."""
    advantages = output["advantages"].view(len(output["advantages"]), -1)
    live = (advantages != 0).any(1) & loss_mask(output).bool().any(1)
    return live.view(-1, size).any(1).nonzero()[:, 0].tolist()


def merge(parts: list[dict], pad_token_id: int) -> dict:
    """Rows of several generation batches as one, padded as TRL pads: prompts left, others right.

    Images are lists of tensors, one per row. A field some parts lack is filled with what it means
    there: no image, no token type, every completion token counted.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    columns = [max(part[f"{half}_ids"].shape[1] for part in parts) for half in _HALVES]
    merged = {}
    for name in names:
        values = [_present(part, name, parts) for part in parts]
        first = values[0]
        if first is None or (isinstance(first, Tensor) and first.ndim == 0):
            merged[name] = first
        elif isinstance(first, list):
            merged[name] = [row for value in values for row in value]
        else:
            fill = pad_token_id if name.endswith("_ids") and name not in WHOLE_ROW else 0
            merged[name] = torch.cat(
                [
                    _widened(name, value, part, columns, fill)
                    for value, part in zip(values, parts, strict=True)
                ]
            )
    return merged


_HALVES = ("prompt", "completion")


def _widened(name: str, value: Tensor, part: dict, columns: list[int], fill: int) -> Tensor:
    """(B, P), (B, C) or (B, P + C) as wide as the merged batch's; others as they are."""
    prompt, completion = (
        width - part[f"{half}_ids"].shape[1] for width, half in zip(columns, _HALVES, strict=True)
    )
    if value.ndim == 1:
        return value
    if name in WHOLE_ROW:
        return pad(value, (prompt, completion), value=fill)
    left = name.startswith("prompt_")
    if not left and value.shape[1] != part["completion_ids"].shape[1]:
        return value  # one value per sequence
    return pad(value, (prompt, 0) if left else (0, completion), value=fill)


def _present(part: dict, name: str, parts: list[dict]):
    if part.get(name) is not None:
        return part[name]
    like = next((p[name] for p in parts if p.get(name) is not None), None)
    rows = len(part["completion_ids"])
    if like is None:
        return None
    if name == "tool_mask":
        return torch.ones_like(part["completion_mask"])
    if name in WHOLE_ROW:
        width = sum(part[f"{half}_ids"].shape[1] for half in _HALVES)
        return like.new_zeros(rows, width)
    if name == "num_images":
        return [0] * rows
    if isinstance(like, list) and isinstance(like[0], Tensor):
        return [like[0][:0]] * rows
    raise InputError(f"{name}: only some of the sampled batches have it, they cannot be joined")
