# SPDX-License-Identifier: Apache-2.0
"""Batches as verl's trainer makes them, of groups whose rows lie scattered."""

import torch

from fastgrpo.models.adapter import Adapter
from fastgrpo.packing import Group
from fastgrpo.testing.models import synthetic_groups

# (images, text tokens, completion lengths): one image, none, and a group of one; ragged
SPECS = (([(4, 6)], 5, [7, 3, 9, 1]), ([(8, 4)], 3, [5, 6]), ([], 11, [4, 8]))
ORDER = (3, 0, 6, 5, 1, 7, 4, 2)  # of the 8 rows: no group lies together


def scattered_rows(model) -> list[tuple[Group, int]]:
    """(group, completion) of each row."""
    rows = [(g, c) for g in synthetic_groups(model, SPECS) for c in range(len(g.completions))]
    return [rows[i] for i in ORDER]


def padded_batch(model, *, seed: int = 5) -> dict[str, torch.Tensor | list]:
    """verl's fields of those rows: prompts left-padded, responses right-padded; some tokens of a
    response do not count, as those of a tool's turn."""
    rows = scattered_rows(model)
    generator = torch.Generator().manual_seed(seed)
    width = max(g.prompt_ids.numel() for g, _ in rows)
    length = max(g.completions[c].numel() for g, c in rows)
    axes = Adapter(model).family.axes
    shape = (len(rows), width + length)
    ids, attended = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    positions = torch.zeros(len(rows), 4, width + length, dtype=torch.int64)
    counted = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, (group, c) in enumerate(rows):
        prompt, completion = group.prompt_ids, group.completions[c]
        span = slice(width - prompt.numel(), width + completion.numel())
        ids[row, span], attended[row, span] = torch.cat([prompt, completion]), 1
        positions[row, 0, span] = torch.arange(prompt.numel() + completion.numel())
        positions[row, 1:, span] = whole_positions(model, group, completion)
        counted[row, : completion.numel()] = 1
        if completion.numel() > 6:
            counted[row, 2:4] = 0
    old = torch.randn(len(rows), length, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "position_ids": positions if axes == 3 else positions[:, 0],
        "prompts": ids[:, :width].clone(),
        "responses": ids[:, width:].clone(),
        "response_mask": counted,
        "old_log_probs": 0.3 * old - 4.5,
        "ref_log_prob": 0.3 * torch.randn(old.shape, generator=generator) - 4.5,
        "advantages": torch.randn(len(rows), 1, generator=generator).expand_as(old).clone(),
        "multi_modal_inputs": [dict(group.vision) for group, _ in rows],
    }


def whole_positions(model, group: Group, completion: torch.Tensor) -> torch.Tensor:
    """(3, L) positions of prompt and completion, from the model's own function of all ids."""
    ids = torch.cat([group.prompt_ids, completion])
    return Adapter(model).prompt_positions(ids, group.vision)[:, :-1].expand(3, -1)
