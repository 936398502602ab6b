# SPDX-License-Identifier: Apache-2.0
"""Batches as verl's trainer makes them, of groups whose rows lie scattered."""

import torch

from fastgrpo.models.adapter import Adapter
from fastgrpo.packing import Group
from fastgrpo.testing.models import TEXT_VOCAB, synthetic_groups

# (images, text tokens, completion lengths): one image, none, and a group of one; ragged
SPECS = (([(4, 6)], 5, [7, 3, 9, 1]), ([(8, 4)], 3, [5, 6]), ([], 11, [4, 8]))
ORDER = (3, 0, 6, 5, 1, 7, 4, 2)  # of the 8 rows: no group lies together


def scattered_rows(model) -> list[tuple[Group, int]]:
    """(group, completion) of each row; a VLM was shown an image inside two of them."""
    groups = synthetic_groups(model, SPECS)
    if Adapter(model).family.serves_images_in_completions:
        for group, shown in ((groups[0], [(6, 8)]), (groups[2], [(4, 4), (4, 6)])):
            (seen,) = synthetic_groups(model, [(shown, 2, [])], seed=len(shown))
            group.completions[1] = torch.cat([seen.prompt_ids, group.completions[1]])
            group.completion_vision = [{} for _ in group.completions]
            group.completion_vision[1] = seen.vision
    rows = [(g, c) for g in groups for c in range(len(g.completions))]
    return [rows[i] for i in ORDER]


def with_its_images(model, group: Group, c: int) -> Group:
    """The prompt with all images of a row, as the plain forward of the sequence takes them."""
    shown = [vision for vision in (group.vision, group.vision_of(c)) if vision]
    return Group(group.prompt_ids, [], Adapter(model).family.join_images(shown) if shown else {})


def padded_batch(model, *, seed: int = 5) -> dict[str, torch.Tensor | list]:
    """verl's fields of those rows: prompts left-padded, responses right-padded; some tokens of a
    response do not count, as those of a tool's turn, images among them."""
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
        whole = with_its_images(model, group, c)
        positions[row, 1:, span] = whole_positions(model, whole, completion)
        counted[row, : completion.numel()] = completion < TEXT_VOCAB
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
        "multi_modal_inputs": [dict(with_its_images(model, *row).vision) for row in rows],
    }


def whole_positions(model, group: Group, completion: torch.Tensor) -> torch.Tensor:
    """(3, L) positions of prompt and completion, from the model's own function of all ids."""
    ids = torch.cat([group.prompt_ids, completion])
    return Adapter(model).prompt_positions(ids, group.vision)[:, :-1].expand(3, -1)
