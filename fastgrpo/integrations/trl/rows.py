# SPDX-License-Identifier: Apache-2.0
"""TRL's padded rows as groups, and per-token values of the groups back as padded rows.

Letters: B rows, P prompt columns (left-padded), C completion columns (right-padded).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.engine.loss import OPTIONAL as LOSS_FIELDS
from fastgrpo.errors import InputError
from fastgrpo.models.family import Family
from fastgrpo.packing import Group
from fastgrpo.packing.host import device_copies, host_copies

# What TRL hands to its per-token pass beside ids, masks and `TYPE_FIELDS`.
IMAGE_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "image_position_ids",
)
TYPE_FIELDS = ("mm_token_type_ids", "token_type_ids")  # (B, P + C); Qwen's name and Gemma's


@dataclass
class Rows:
    """The rows of one padded batch, unpadded, ids and sizes of images on the host.

    `prompts[b]` (P_b,) and `completions[b]` (C_b,) are cut by the attention mask, never by the pad
    id, which may occur inside either. `vision[b]` holds the images of row b's prompt, `shown[b]`
    those a tool returned inside its completion. `device`: the batch's.
    """

    prompts: list[Tensor]
    completions: list[Tensor]
    vision: list[dict[str, Tensor]]
    shown: list[dict[str, Tensor]]
    num_columns: int  # C
    device: torch.device  # of the batch; ids are on the host


def read_rows(
    input_ids: Tensor,
    attention_mask: Tensor,
    num_columns: int,
    family: Family,
    fields: Mapping[str, Tensor | None],
    *,
    num_images: list[int] | None = None,
    mm_token_type_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Rows:
    """Unpads (B, P + C) ids, on the host: one copy of ids, masks and the sizes of images, however
    many rows.

    `fields` are the batch's image inputs by TRL's names; what each token is has Qwen's name or
    Gemma's.

    A completion must be contiguous and start in column P, and may hold images of a tool where the
    family serves them; raises `InputError` naming the row.
    """
    device, width = input_ids.device, input_ids.shape[1] - num_columns
    types = [types for types in (mm_token_type_ids, token_type_ids) if types is not None]
    sizes = [n for n, x in fields.items() if isinstance(x, Tensor) and not x.is_floating_point()]
    read = iter(host_copies([input_ids, attention_mask, *types, *(fields[n] for n in sizes)]))
    input_ids, attention_mask = next(read), next(read)
    types = [next(read) for _ in types]
    fields = {**fields, **dict(zip(sizes, read, strict=True))}
    prompt_mask, completion_mask = attention_mask.bool().split([width, num_columns], dim=1)
    prompt_ids, completion_ids = input_ids.split([width, num_columns], dim=1)
    lengths = completion_mask.sum(1)
    hole = (completion_mask != (torch.arange(num_columns) < lengths[:, None])).any(1)
    if hole.any():
        raise InputError(
            f"row {int(hole.nonzero()[0])}: the completion mask has a hole; a completion must be "
            "right-padded"
        )
    vision = family.split_rows(fields, num_images, len(input_ids))
    shown: list[dict[str, Tensor]] = [{} for _ in vision]
    behind = [row for kinds in types for row in kinds[:, width:].any(1).nonzero()[:, 0].tolist()]
    if behind:
        if not family.serves_images_in_completions:
            raise InputError(
                f"row {behind[0]}: images inside a completion are not served for family "
                f"{family.name!r}. A batch whose tools returned images is left to TRL's padded "
                f"forward; these came another way (a rollout_func), so use TRL's own trainer"
            )
        (kinds,) = types
        inside = kinds[:, :width] == 1
        parts = [family.at_the_prompt(*row) for row in zip(vision, inside, strict=True)]
        vision, shown = [part[0] for part in parts], [part[1] for part in parts]
    return Rows(
        prompts=[ids[keep] for ids, keep in zip(prompt_ids, prompt_mask, strict=True)],
        completions=[c[:n] for c, n in zip(completion_ids, lengths.tolist(), strict=True)],
        vision=vision,
        shown=shown,
        num_columns=num_columns,
        device=device,
    )


def scorable(rows: Rows) -> list[int]:
    """Rows with completion tokens: not those that are empty, or masked because truncated."""
    return [row for row, ids in enumerate(rows.completions) if ids.numel()]


def as_groups(rows: Rows, members: list[int]) -> list[Group]:
    """One group of one completion per row of `members`; `score` brings equal prompts together.

    A row without a completion token (see `anchor_row`) gets one that counts nowhere.
    """
    groups = []
    for row in members:
        prompt, completion = rows.prompts[row], rows.completions[row]
        options = {"sample_id": f"row {row}"}
        if completion.numel() == 0:
            completion, options["mask"] = prompt[-1:], [torch.zeros(1)]
        elif rows.shown[row]:
            options["completion_vision"] = [rows.shown[row]]
        groups.append(Group(prompt, [completion], rows.vision[row], **options))
    return groups


def without_gradient(rows: Rows, members: list[int], weightless: list[bool]) -> list[int]:
    """Those `members` whose prompt has only completions of zero weight.

    (A completion of zero weight next to others is scored with them: its prompt is there already.)
    """
    prompts = {row: tuple(rows.prompts[row].tolist()) for row in members}
    live = {prompts[row] for row in members if not weightless[row]}
    return [row for row in members if prompts[row] not in live]


def anchor_row(
    rows: Rows, members: list[int], idle: list[int], *, needed: bool
) -> tuple[list[int], list[int]]:
    """The rows to run with gradient, and those of `idle` to run without.

    TRL's forward covers rows that are not scored (see `scorable`): the optimizer's momentum moves
    parameters only they reach, and every process must run the same forwards. So where `needed`,
    one row more runs with gradient when none would, or none with images although there are some:
    its gradient is zero, and no parameter is without one.
    """
    live = [row for row in members if row not in set(idle)]
    with_images = [row for row, vision in enumerate(rows.vision) if vision]
    covered = live and (not with_images or any(rows.vision[row] for row in live))
    if covered or not needed:
        return live, idle
    choices = with_images or range(len(rows.prompts))
    idle_ones = [row for row in choices if row in set(idle)]
    row = min(idle_ones, key=lambda r: len(rows.completions[r]), default=choices[0])
    return [*live, row], [other for other in idle if other != row]


class LossTables:
    """What the loss reads of each row beside its ids, copied to the host at once.

    `advantages` (B,) or (B, C), `mask` (B, C) of the tokens that count, `columns` (B, C) tables
    by the names of `Group`'s fields, or of a stream.
    """

    def __init__(self, advantages: Tensor, mask: Tensor, columns: dict[str, Tensor]):
        given = [x.float() for x in (advantages, mask, *columns.values())]
        self.advantages, mask, *tables = host_copies(given)
        self.mask, self.columns = mask != 0, dict(zip(columns, tables, strict=True))
        self.num_rows, self.num_tokens = len(mask), int(self.mask.sum())

    def weightless(self) -> list[bool]:
        """Rows whose advantages are all 0."""
        return (self.advantages.view(self.num_rows, -1) == 0).all(1).tolist()

    def groups(self, rows: Rows, members: list[int]) -> list[Group]:
        """`as_groups` with all that the loss needs."""
        groups = as_groups(rows, members)
        for i, row in enumerate(members):
            length, own = groups[i].lengths[0], self.advantages[row]
            extra = {name: [table[row, :length]] for name, table in self.columns.items()}
            fields = {name: extra.pop(name) for name in list(extra) if name in LOSS_FIELDS}
            fields["advantages"] = own[None] if own.ndim == 0 else [own[:length]]
            fields["mask"] = [self.mask[row, :length]]
            groups[i] = replace(groups[i], streams=extra, **fields)
        return groups


def scatter(values: list[Tensor], members: list[int], rows: Rows) -> Tensor:
    """(B, C) float32 with `values[i]` (C_i,) in row `members[i]`; exactly 0 elsewhere."""
    shape = (len(rows.prompts), rows.num_columns)
    if not members:
        return torch.zeros(shape, device=rows.device)
    columns = torch.arange(rows.num_columns)
    index = torch.cat(
        [columns[: len(v)] + row * shape[1] for v, row in zip(values, members, strict=True)]
    )
    (index,) = device_copies([index], rows.device)
    flat = torch.zeros(shape, device=rows.device).view(-1)
    return flat.index_copy(0, index, torch.cat(values).float()).view(shape)


def plan_micro_batches(
    group_of_row: list[int],
    order: list[int],
    num_batches: int,
    *,
    live: list[bool],
    batches_per_step: int,
    costs: list[float] | None = None,
) -> list[int]:
    """A permutation of the rows whose equal chunks hold whole groups wherever they fit.

    `order` is a permutation of the rows: groups are placed in the order it first meets them. Groups
    with a `live` row are spread evenly over the optimizer steps of `batches_per_step` chunks each,
    in parts where there are fewer of them than steps, so that no step holds dead rows alone while
    another has several live ones. Within a step a group is placed into the first chunk with room
    for all of it; rows of the groups that fit nowhere fill the gaps. Rows of a chunk keep the order
    they came in. With the rows' `costs` the chunks of a step come by descending cost: processes
    that meet in every chunk then wait least for each other.
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
        whole = [sorted(row for part in chunk for row in part) for chunk in chunks]
        if costs is not None:
            whole.sort(key=lambda rows: -sum(costs[row] for row in rows))
        plan += [row for rows in whole for row in rows]
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
