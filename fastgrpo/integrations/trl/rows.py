"""TRL's padded rows as groups, and per-token values of the groups back as padded rows.

Letters: B rows, P prompt columns (left-padded), C completion columns (right-padded).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.models.family import Family
from fastgrpo.packing import Group


@dataclass
class Rows:
    """The rows of one padded batch, unpadded.

    `prompts[b]` (P_b,) and `completions[b]` (C_b,) are cut by the attention mask, never by the pad
    id, which may occur inside either. `vision[b]` holds row b's own images.
    """

    prompts: list[Tensor]
    completions: list[Tensor]
    vision: list[dict[str, Tensor]]
    num_columns: int  # C


def read_rows(
    input_ids: Tensor,
    attention_mask: Tensor,
    num_columns: int,
    family: Family,
    fields: Mapping[str, Tensor | None],
    *,
    num_images: list[int] | None = None,
    mm_token_type_ids: Tensor | None = None,
) -> Rows:
    """Unpads (B, P + C) ids; `fields` are the batch's image inputs by TRL's names.

    A completion must be contiguous and start in column P, and may hold no images of a tool; raises
    `InputError` naming the row.
    """
    width = input_ids.shape[1] - num_columns
    prompt_mask, completion_mask = attention_mask.bool().split([width, num_columns], dim=1)
    prompt_ids, completion_ids = input_ids.split([width, num_columns], dim=1)
    lengths = completion_mask.sum(1)
    columns = torch.arange(num_columns, device=input_ids.device)
    hole = (completion_mask != (columns < lengths[:, None])).any(1)
    if hole.any():
        raise InputError(
            f"row {int(hole.nonzero()[0])}: the completion mask has a hole; a completion must be "
            "right-padded"
        )
    if mm_token_type_ids is not None and mm_token_type_ids[:, width:].any():
        raise InputError(
            "images inside a completion (returned by a tool) cannot be packed; train this "
            "environment with TRL's own trainer"
        )
    return Rows(
        prompts=[ids[keep] for ids, keep in zip(prompt_ids, prompt_mask, strict=True)],
        completions=[c[:n] for c, n in zip(completion_ids, lengths.tolist(), strict=True)],
        vision=family.split_rows(fields, num_images, len(input_ids)),
        num_columns=num_columns,
    )


def scorable(rows: Rows) -> list[int]:
    """Rows with completion tokens: not those that are empty, or masked because truncated."""
    return [row for row, ids in enumerate(rows.completions) if ids.numel()]


def as_groups(rows: Rows, members: list[int]) -> list[Group]:
    """One group of one completion per row of `members`; `score` brings equal prompts together."""
    return [
        Group(rows.prompts[row], [rows.completions[row]], rows.vision[row], sample_id=f"row {row}")
        for row in members
    ]


def without_gradient(rows: Rows, members: list[int], weightless: list[bool]) -> list[int]:
    """Those `members` whose prompt has only completions of zero weight.

    (A completion of zero weight next to others is scored with them: its prompt is there already.)
    """
    prompts = {row: tuple(rows.prompts[row].tolist()) for row in members}
    live = {prompts[row] for row in members if not weightless[row]}
    return [row for row in members if prompts[row] not in live]


def anchor_group(rows: Rows, members: list[int]) -> list[Group]:
    """A group to score with weight 0, so that the parameters TRL gives a zero gradient get one.

    TRL's forward covers rows that are not scored (see `scorable`): the optimizer's momentum moves
    parameters only they reach, and every process must run the same forwards. Needed when no row is
    scored, or none with images although there are some; [] otherwise.
    """
    with_images = [row for row, vision in enumerate(rows.vision) if vision]
    if members and (not with_images or any(rows.vision[row] for row in members)):
        return []
    row = with_images[0] if with_images else 0
    prompt = rows.prompts[row]
    return [Group(prompt, [prompt[-1:]], rows.vision[row], sample_id=f"row {row}")]


def scatter(values: list[Tensor], members: list[int], rows: Rows) -> Tensor:
    """(B, C) float32 with `values[i]` (C_i,) in row `members[i]`; exactly 0 elsewhere."""
    shape = (len(rows.prompts), rows.num_columns)
    device = rows.prompts[0].device
    if not members:
        return torch.zeros(shape, device=device)
    columns = torch.arange(rows.num_columns, device=device)
    index = torch.cat(
        [columns[: len(v)] + row * shape[1] for v, row in zip(values, members, strict=True)]
    )
    flat = torch.zeros(shape, device=device).view(-1)
    return flat.index_copy(0, index, torch.cat(values).float()).view(shape)


def plan_micro_batches(
    group_of_row: list[int],
    order: list[int],
    num_batches: int,
    *,
    live: list[bool],
    batches_per_step: int,
) -> list[int]:
    """A permutation of the rows whose equal chunks hold whole groups wherever they fit.

    `order` is a permutation of the rows: groups are placed in the order it first meets them. Groups
    with a `live` row are spread evenly over the optimizer steps of `batches_per_step` chunks each,
    in parts where there are fewer of them than steps, so that no step holds dead rows alone while
    another has several live ones. Within a step a group is placed into the first chunk with room
    for all of it; rows of the groups that fit nowhere fill the gaps.
    """
    rows_of_group: dict[int, list[int]] = {}
    for row in order:
        rows_of_group.setdefault(group_of_row[row], []).append(row)
    groups = list(rows_of_group.values())
    num_steps = 1 if num_batches % batches_per_step else num_batches // batches_per_step
    alive = [rows for rows in groups if any(live[row] for row in rows)]
    dead = [rows for rows in groups if not any(live[row] for row in rows)]
    steps = _spread(alive, live, num_steps, len(order) // num_steps)
    _fill(steps, dead, len(order) // num_steps)
    plan: list[int] = []
    for members in steps:
        chunks: list[list[list[int]]] = [[] for _ in range(num_batches // num_steps)]
        _fill(chunks, members, len(order) // num_batches)
        plan += [row for chunk in chunks for part in chunk for row in part]
    return plan


def _spread(
    groups: list[list[int]], live: list[bool], num_bins: int, room: int
) -> list[list[list[int]]]:
    """The groups, in parts where they must be, each into the bin with the fewest live rows."""

    def count(parts: list[list[int]]) -> tuple[int, int]:
        rows = [row for part in parts for row in part]
        return sum(live[row] for row in rows), len(rows)

    parts = list(groups)
    while 0 < len(parts) < num_bins:
        largest = max(parts, key=lambda part: count([part]))
        if count([largest])[0] < 2:
            break
        parts.remove(largest)
        dealt = sorted(largest, key=lambda row: not live[row])  # both halves get live rows
        parts += [dealt[::2], dealt[1::2]]
    parts.sort(key=lambda part: count([part]), reverse=True)
    bins: list[list[list[int]]] = [[] for _ in range(num_bins)]
    while parts:
        part = parts.pop(0)
        chosen = min((b for b in bins if count(b)[1] < room), key=count)
        free = room - count(chosen)[1]
        chosen.append(part[:free])
        if part[free:]:
            parts.append(part[free:])
    return bins


def _fill(bins: list[list[list[int]]], groups: list[list[int]], room: int) -> None:
    """Each group into the first bin with room for all of it; the rest fills the gaps."""
    left: list[int] = []
    for rows in groups:
        whole = (b for b in bins if sum(map(len, b)) + len(rows) <= room)
        chosen = next(whole, None)
        left.extend(rows) if chosen is None else chosen.append(rows)
    for bin_ in bins:
        take = room - sum(map(len, bin_))
        if take and left:
            bin_.append(left[:take])
            del left[:take]
