# SPDX-License-Identifier: Apache-2.0
"""A packed layout as the shared-prefix attention kernels read it.

Letters: T packed tokens, S segments, H query heads, K key/value heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.checks import check_tensor
from fastgrpo.errors import InputError

BLOCK_ROWS = 128  # rows of one table entry; the kernels' tiles divide it
# An item of dK/dV costs the loads of its keys and a float32 part to write and to add, so that none
# is cut below this many (query head, row) pairs (bench/occupancy.py).
SMALLEST_ITEM = 1024


class PrefixTables(NamedTuple):
    """A layout in tables, built once per layout by `prefix_tables`.

    segments (S, 4) int64: start, end, prefix_start, prefix_end of each run of rows.
    blocks (B, 5) int32, for the queries: start, seg_start, seg_end, prefix_start, prefix_len of at
        most `block_rows` rows, the most keys first.
    items (I, 7) int32, for the gradients of keys: start, seg_end of at most `block_rows` rows,
        shift (text position = row + shift), query_end, share i of n of the (query head, row) pairs
        that see them, slot of its part (-1: the item is the whole sum), the most work first.
    sums (E, 4) int32: start, seg_end, first slot and number of slots of each block cut into items.
    positions (T,) int32: text position of each row (a completion continues its prompt's).
    """

    segments: Tensor
    blocks: Tensor
    items: Tensor
    sums: Tensor
    positions: Tensor
    block_rows: int
    slots: int


def prefix_tables(
    segments: Tensor,
    device: torch.device | str | None = None,
    *,
    heads: tuple[int, int] = (1, 1),
    processors: int | None = None,
) -> PrefixTables:
    """The tables of a packed row of groups [prompt, completion, ...].

    segments (S, 4) int64: start, end, prefix_start, prefix_end. Segments tile the rows in order
    and may be empty. A completion's prefix is a whole earlier segment that itself has none, with
    nothing between the two but other completions of it; a prompt has prefix_start == prefix_end.
    heads (H, K) and processors (default: the device's multiprocessors) balance the gradients of
    keys; the tables are right for any other heads too. Raises InputError naming the segment that
    breaks the form. Reads `segments` on the host: build tables once per layout, not per layer.
    """
    check_tensor("segments", segments, "S 4", dtypes=(torch.int64, torch.int32))
    device = segments.device if device is None else torch.device(device)
    seg = segments.detach().to("cpu", torch.int64)
    owner = _check_segments(seg)
    start, end, prefix_start, prefix_end = seg.unbind(1)
    length, prefix_len = end - start, prefix_end - prefix_start
    # Rows from a prompt's key to the end of its group see that key: one run, no gaps.
    query_end = end.clone()
    query_end.scatter_reduce_(0, owner, end, "amax")

    of, nth = _repeat((length + BLOCK_ROWS - 1) // BLOCK_ROWS)
    row = start[of] + nth * BLOCK_ROWS
    blocks = torch.stack([row, start[of], end[of], prefix_start[of], prefix_len[of]], 1)
    by_query = torch.argsort(prefix_len[of] + row - start[of], descending=True, stable=True)
    shift = prefix_len[of] - start[of]
    if processors is None:
        processors = _processors(device)
    items, sums, slots = _key_items(row, end[of], shift, query_end[of], heads, processors)
    token, _ = _repeat(length)
    positions = torch.arange(len(token), device="cpu") - start[token] + prefix_len[token]
    return PrefixTables(
        segments=seg.to(device),
        blocks=blocks[by_query].to(device, torch.int32),
        items=items.to(device, torch.int32),
        sums=sums.to(device, torch.int32),
        positions=positions.to(device, torch.int32),
        block_rows=BLOCK_ROWS,
        slots=slots,
    )


def _key_items(
    row: Tensor, seg_end: Tensor, shift: Tensor, query_end: Tensor,
    heads: tuple[int, int], processors: int,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """The work items of key blocks at `row`, the sums of those that were cut, and their slots.

    A block's work is its query rows times the query heads of a key head. The largest are cut until
    the items are whole rounds of the processors, a round more than half again the blocks.
    """
    work = (query_end - row) * (heads[0] // heads[1])
    rounds = -(-3 * len(row) * heads[1] // (2 * processors)) + 1
    count = _shares(work, rounds * processors // heads[1])
    cut = count > 1
    of, nth = _repeat(count)
    first = torch.cumsum(count * cut, 0) - count * cut
    slot = torch.where(cut[of], first[of] + nth, -1)
    columns = [row[of], seg_end[of], shift[of], query_end[of], nth, count[of], slot]
    order = torch.argsort(work[of] / count[of], descending=True, stable=True)
    sums = torch.stack([row, seg_end, first, count], 1)[cut]
    return torch.stack(columns, 1)[order], sums, int((count * cut).sum())


def _shares(work: Tensor, items: int) -> Tensor:
    """Into how many shares each block is cut: equal ones as small as `items` of them allow."""
    low, high = SMALLEST_ITEM, max([SMALLEST_ITEM, *work.tolist()])
    while low < high:
        middle = (low + high) // 2
        if int(((work + middle - 1) // middle).sum()) <= items:
            high = middle
        else:
            low = middle + 1
    return (work + high - 1) // high


def _repeat(count: Tensor) -> tuple[Tensor, Tensor]:
    """For entry i repeated count[i] times: which entry it is, and which of its repetitions."""
    of = torch.repeat_interleave(torch.arange(len(count), device="cpu"), count)
    return of, torch.arange(len(of), device="cpu") - (torch.cumsum(count, 0) - count)[of]


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_segments(seg: Tensor) -> Tensor:
    """For each segment the one whose keys it extends (its prefix, or itself); InputError if bad."""
    owners, expected, current = [], 0, -1
    rows = seg.tolist()
    for i, (start, end, prefix_start, prefix_end) in enumerate(rows):
        if start != expected or end < start:
            raise InputError(
                f"segments: row {i} is [{start}, {end}), expected to start at {expected} and not "
                "to end before that: segments tile the packed row in order"
            )
        if prefix_start == prefix_end:
            current = i
        elif current < 0 or [prefix_start, prefix_end] != rows[current][:2]:
            before = "nothing" if current < 0 else f"rows {rows[current][:2]}"
            raise InputError(
                f"segments: row {i} has prefix [{prefix_start}, {prefix_end}), expected the prompt "
                f"before it ({before})"
            )
        owners.append(current)
        expected = end
    return torch.tensor(owners, dtype=torch.int64, device="cpu")
