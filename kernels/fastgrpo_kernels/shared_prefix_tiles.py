# SPDX-License-Identifier: Apache-2.0
"""What the shared-prefix attention kernels share: tiles of rows, the key map, masks, logits.

Letters: T packed tokens, H query heads, K key/value heads, D head dimension.

A completion attends to the *virtual* sequence "its prefix, then itself". Key j of that sequence
lies in row `prefix_start + j` for j < prefix_len and in row `seg_start + j - prefix_len` after, so
one loop over j with that row map is the whole algorithm: nothing is gathered, and causal masking
and the sliding window are plain comparisons of j with the query's text position.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
STRIDE_UNIT = tl.constexpr(8)  # strides come in 8 elements, so that loads are known to be aligned
QUERY_BLOCK = tl.constexpr(5)  # columns of the tables; see `fastgrpo.ops.prefix_tables`
KEY_ITEM = tl.constexpr(7)
KEY_SUM = tl.constexpr(4)


@triton.jit
def load_tile(ptr, rows, stride, bound, D: tl.constexpr, PAD: tl.constexpr, CHECK: tl.constexpr):
    """Rows of a (T, D) matrix as a (rows, PAD) tile; zeros outside `bound` and beyond D."""
    dims = tl.arange(0, PAD)
    at = ptr + rows.to(tl.int64)[:, None] * (stride * STRIDE_UNIT) + dims[None, :]
    if CHECK:
        live = (bound[:, None]) & (dims[None, :] < D)
        return tl.load(at, mask=live, other=0.0)
    if D != PAD:
        return tl.load(at, mask=dims[None, :] < D, other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(ptr, rows, stride, value, live, D: tl.constexpr, PAD: tl.constexpr):
    """The first D columns of a (rows, PAD) tile into the live rows of a (T, D) matrix."""
    dims = tl.arange(0, PAD)
    at = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=live[:, None] & (dims[None, :] < D))


@triton.jit
def capped(s, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits in units of log 2 from raw dot products."""
    if SOFTCAP:
        return (2.0 * tl.sigmoid(s * (2.0 * scale / softcap)) - 1.0) * (softcap * LOG2E)
    return s * (scale * LOG2E)


@triton.jit
def through_cap(ds, x, softcap, SOFTCAP: tl.constexpr):
    """Gradient with respect to scale * s, given the one with respect to the capped logit x ln 2."""
    if SOFTCAP:
        t = x * (LN2 / softcap)
        return ds * (1.0 - t * t)
    return ds


@triton.jit
def query_block(table_ptr, pid, TILE_M: tl.constexpr, ENTRY: tl.constexpr):
    """First row of this program's tile, and of its segment: first row, end, prefix."""
    entry = table_ptr + (pid // (ENTRY // TILE_M)) * QUERY_BLOCK
    start = tl.load(entry) + (pid % (ENTRY // TILE_M)) * TILE_M
    return (
        start,
        tl.load(entry + 1),
        tl.load(entry + 2),
        tl.load(entry + 3),
        tl.load(entry + 4),
    )


@triton.jit
def key_range(
    start, seg_start, seg_end, prefix_len, window,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Text positions of a tile of queries, which see the virtual keys [low, full) without a mask
    and [full, high) with one."""
    shift = prefix_len - seg_start
    first = start + shift
    last = tl.minimum(start + TILE_M, seg_end) - 1 + shift
    q_pos = first + tl.arange(0, TILE_M)
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // TILE_N * TILE_N
        return q_pos, low, low, last + 1
    return q_pos, 0, (first + 1) // TILE_N * TILE_N, last + 1


@triton.jit
def logits_of_keys(
    q, k_ptr, start, high, seg_start, prefix_start, prefix_len, stride_k, q_pos,
    window, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys from virtual key `start` on: their rows and which exist, the keys, their
    logits in units of log 2, and which of them each query sees (all of them unless MASKED)."""
    j = start + tl.arange(0, TILE_N)
    rows = j + tl.where(j < prefix_len, prefix_start, seg_start - prefix_len)
    k = load_tile(k_ptr, rows, stride_k, j < high, D, PAD, MASKED)
    x = capped(tl.dot(q, tl.trans(k), input_precision="tf32x3"), scale, softcap, SOFTCAP)
    seen = j[None, :] <= q_pos[:, None]
    if WINDOW:
        seen = seen & (j[None, :] > q_pos[:, None] - window)
    return rows, j < high, k, x, seen
