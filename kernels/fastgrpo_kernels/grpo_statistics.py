# SPDX-License-Identifier: Apache-2.0
"""The statistics of a GRPO loss: gathered by pieces, added up by sequence, then over sequences.

A vector of CELLS numbers describes a piece, a sequence or the whole call: sums first, then maxima
(minima negated). Its cells lie `slots` apart, one column of slots per cell. The last program of a
sequence joins its pieces, the last of all its sequences: fixed order, no atomic but the tickets.

Letters: B sequences.
"""

import triton
import triton.language as tl

from fastgrpo_kernels.grpo_formulas import INF
from fastgrpo_kernels.grpo_pieces import slot_of

SUMS = (
    *("loss", "count", "kl", "entropy", "low", "high", "region", "extra"),
    *("gap", "known", "w", "spread", "acting", "acting_entropy"),
)
MAXIMA = ("ratio", "-ratio", "gap_max", "w_max", "-w", "-low_mean", "high_mean")
NAMES = SUMS + MAXIMA
CELLS = 32
AT = {name: tl.constexpr(i) for i, name in enumerate(NAMES)}
NUM_SUMS, NUM_NAMES = tl.constexpr(len(SUMS)), tl.constexpr(len(NAMES))
# The two that only a whole sequence has come last.
OF_PIECE = tl.constexpr(len(NAMES) - 2)
LOSS, COUNT, KL, ENTROPY = AT["loss"], AT["count"], AT["kl"], AT["entropy"]
LOW, HIGH, REGION, OTHER = AT["low"], AT["high"], AT["region"], AT["extra"]
GAP, KNOWN, W, SPREAD = AT["gap"], AT["known"], AT["w"], AT["spread"]
ACTING, ACTING_ENTROPY = AT["acting"], AT["acting_entropy"]
RATIO_MAX, RATIO_MIN, GAP_MAX = AT["ratio"], AT["-ratio"], AT["gap_max"]
W_MAX, W_MIN = AT["w_max"], AT["-w"]
LOW_MEAN, HIGH_MEAN = AT["-low_mean"], AT["high_mean"]


@triton.jit
def cell(vector, at: tl.constexpr):
    """One number of a vector."""
    return tl.sum(tl.where(tl.arange(0, 32) == at, vector, 0.0), 0)


@triton.jit
def join_pieces(table_ptr, slots, piece, B, TILE: tl.constexpr, PIECES: tl.constexpr):
    """The vector of a sequence from those of its pieces."""
    c = tl.arange(0, 32)[:, None]
    is_sum = c < NUM_SUMS
    sums = tl.zeros((32, PIECES), tl.float32)
    tops = tl.full((32, PIECES), -INF, tl.float32)
    for first in range(0, piece.count, PIECES):
        index = first + tl.arange(0, PIECES)[None, :]
        slot = slot_of(piece, index, B, TILE)
        there = (index < piece.count) & (c < OF_PIECE)
        x = tl.load(table_ptr + c * slots + slot, mask=there, other=tl.where(is_sum, 0.0, -INF))
        sums += x
        tops = tl.maximum(tops, x)
    return tl.where(tl.arange(0, 32) < NUM_SUMS, tl.sum(sums, 1), tl.max(tops, 1))


@triton.jit
def of_sequence(v, FLAG_MEANS: tl.constexpr, EXTRA_MEANS: tl.constexpr):
    """A sequence's vector with what is a mean over its tokens made one."""
    c = tl.arange(0, 32)
    count = cell(v, COUNT)
    tokens = tl.maximum(count, 1.0)
    low_mean, high_mean = cell(v, LOW) / tokens, cell(v, HIGH) / tokens
    if FLAG_MEANS:
        v = tl.where((c >= LOW) & (c <= REGION), v / tokens, v)
    if EXTRA_MEANS:
        v = tl.where(c == OTHER, v / tokens, v)
    present = (count > 0) | FLAG_MEANS
    v = tl.where(c == LOW_MEAN, tl.where(present, -low_mean, -INF), v)
    return tl.where(c == HIGH_MEAN, tl.where(present, high_mean, -INF), v)


@triton.jit
def join_sequences(table_ptr, slots, B, ROWS: tl.constexpr):
    """(vector of the whole call, its loss in float64) from those of the sequences."""
    c = tl.arange(0, 32)[:, None]
    is_sum = c < NUM_SUMS
    sums = tl.zeros((32, ROWS), tl.float32)
    tops = tl.full((32, ROWS), -INF, tl.float32)
    losses = tl.zeros((ROWS,), tl.float64)
    for first in range(0, B, ROWS):
        row = first + tl.arange(0, ROWS)
        x = tl.load(
            table_ptr + c * slots + row[None, :],
            mask=(row < B)[None, :] & (c < NUM_NAMES),
            other=tl.where(is_sum, 0.0, -INF),
        )
        sums += x
        tops = tl.maximum(tops, x)
        losses += tl.load(table_ptr + LOSS * slots + row, mask=row < B, other=0.0).to(tl.float64)
    v = tl.where(tl.arange(0, 32) < NUM_SUMS, tl.sum(sums, 1), tl.max(tops, 1))
    return v, tl.sum(losses, 0)


@triton.jit
def _write(stats_ptr, at, value, count):
    tl.store(stats_ptr + 2 * at, value)
    tl.store(stats_ptr + 2 * at + 1, count)


@triton.jit
def write_statistics(
    stats_ptr,
    v,
    policy_loss,
    B,
    HAS_KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    CLIPS: tl.constexpr,
    EXTRA: tl.constexpr,
    ROLLOUT_LEVEL: tl.constexpr,
    FLAG_MEANS: tl.constexpr,
    EXTRA_MEANS: tl.constexpr,
):
    """The (K, 2) statistics in the order of `fastgrpo.losses.metrics.metric_names`."""
    count, rows = cell(v, COUNT), B.to(tl.float32)
    _write(stats_ptr, 0, policy_loss, 0.0)
    _write(stats_ptr, 1, -cell(v, RATIO_MIN), 0.0)
    _write(stats_ptr, 2, cell(v, RATIO_MAX), 0.0)
    stats_ptr += 6
    if HAS_KL:
        _write(stats_ptr, 0, cell(v, KL), count)
        stats_ptr += 2
    if HAS_ENTROPY:
        _write(stats_ptr, 0, cell(v, ENTROPY), count)
        stats_ptr += 2
    if EXTRA:
        _write(stats_ptr, 0, cell(v, OTHER), rows if EXTRA_MEANS else count)
        stats_ptr += 2
    if CLIPS:
        level = rows if FLAG_MEANS else count
        _write(stats_ptr, 0, cell(v, LOW), level)
        _write(stats_ptr, 1, cell(v, HIGH), level)
        _write(stats_ptr, 2, cell(v, REGION), level)
        _write(stats_ptr, 3, -cell(v, LOW_MEAN), 0.0)
        _write(stats_ptr, 4, cell(v, HIGH_MEAN), 0.0)
        stats_ptr += 10
    if ROLLOUT_LEVEL != "":
        weights = count if ROLLOUT_LEVEL == "token" else rows
        _write(stats_ptr, 0, cell(v, GAP), cell(v, KNOWN))
        _write(stats_ptr, 1, cell(v, GAP_MAX), 0.0)
        _write(stats_ptr, 2, -cell(v, W_MIN), 0.0)
        _write(stats_ptr, 3, cell(v, W), weights)
        _write(stats_ptr, 4, cell(v, W_MAX), 0.0)
