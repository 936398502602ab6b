# SPDX-License-Identifier: Apache-2.0
"""Which program works on which tokens of a packed row of sequences, and who comes last.

Sequences are cut into pieces of TILE tokens, each from its own start, so that nothing depends on
where a sequence lies. Program i < B takes the first piece of sequence i. One more program stands
for each multiple m TILE of the packed tokens and takes the later piece that starts in
[m TILE, (m + 1) TILE), if there is one: it belongs to the sequence of token m TILE - 1, and there
are never two. So the grid is known without the lengths, which are on the GPU.

Letters: N packed tokens, B sequences.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Piece(NamedTuple):
    """Piece `index` of `count` of a sequence: tokens [start, end) of [row_start, row_end)."""

    row: tl.tensor
    index: tl.tensor
    count: tl.tensor
    start: tl.tensor
    end: tl.tensor
    row_start: tl.tensor
    row_end: tl.tensor


def programs(num_tokens: int, num_rows: int, tile: int) -> int:
    """Programs of a launch over B = num_rows > 0 sequences."""
    return num_rows + max(num_tokens - 1, 0) // tile


@triton.jit
def first_at_least(ids_ptr, target, low, N, WIDTH: tl.constexpr):
    """The first i in [low, N) with ids[i] >= target, else N; ids non-decreasing."""
    high = N
    while low < high:
        step = tl.cdiv(high - low, WIDTH)
        at = low + tl.arange(0, WIDTH) * step
        below = tl.load(ids_ptr + at, mask=at < high, other=target) < target
        count = tl.sum(below.to(tl.int32), 0).to(tl.int64)
        high = tl.minimum(high, low + count * step)
        low = tl.where(count > 0, low + (count - 1) * step + 1, low)
    return low


@triton.jit
def locate(seq_ids_ptr, N, B, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """The piece of this program; one that starts at or after its end is nobody's."""
    pid = tl.program_id(0).to(tl.int64)
    later = pid >= B
    edge = (pid - B + 1) * TILE
    row = tl.where(later, tl.load(seq_ids_ptr + edge - 1, mask=later, other=0), pid)
    zero = pid * 0
    row_start = first_at_least(seq_ids_ptr, row, zero, zero + N, WIDTH)
    row_end = first_at_least(seq_ids_ptr, row + 1, row_start, zero + N, WIDTH)
    index = tl.where(later, tl.cdiv(edge - row_start, TILE), 0)
    start = row_start + index * TILE
    end = tl.minimum(start + TILE, row_end)
    count = tl.maximum(tl.cdiv(row_end - row_start, TILE), 1)
    return Piece(row, index, count, start, end, row_start, row_end)


@triton.jit
def slot_of(piece, index, B, TILE: tl.constexpr):
    """The program that takes piece `index` of the same sequence."""
    return tl.where(index == 0, piece.row, B + piece.row_start // TILE + index - 1)


@triton.jit
def last_to_arrive(counter_ptr, expected):
    """Whether this is the last of `expected` programs here, which sees what all of them stored.

    Integers in float32, exact below 2^24: the memory is shared with sums.
    """
    tl.debug_barrier()  # every thread has stored before one of them says so
    before = tl.atomic_add(counter_ptr, 1.0, sem="acq_rel")
    tl.debug_barrier()
    return before == expected - 1
