# SPDX-License-Identifier: Apache-2.0
"""The kernels of the GRPO loss; what they compute and in which order says `grpo_loss`."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastgrpo_kernels.grpo_formulas import gmpo_k
from fastgrpo_kernels.grpo_pieces import last_to_arrive, locate
from fastgrpo_kernels.grpo_statistics import (
    ACTING,
    ACTING_ENTROPY,
    COUNT,
    NUM_NAMES,
    SPREAD,
    cell,
    join_pieces,
    join_sequences,
    of_sequence,
    write_statistics,
)
from fastgrpo_kernels.grpo_tokens import Streams, add, flags, no_sums, shared_by, terms_of, token

# Two tokens per thread: the statistics take most of the registers.
BLOCK, TILE, NUM_WARPS = 256, 2048, 4
# Left to itself ptxas spills a register to fit one more program on a multiprocessor.
OPTIONS = {"maxnreg": 128}
# The working memory starts with what backward multiplies dlogp and the entropy's gradient by, and
# the ticket of the sequences; then come the tickets of their pieces and the table of statistics.
HEAD = tl.constexpr(4)
_POINTERS = [
    *("logp_ptr", "advantages_ptr", "seq_ids_ptr", "mask_ptr", "acting_ptr", "old_ptr", "ref_ptr"),
    *("rollout_ptr", "entropy_ptr", "token_weights_ptr", "scales_ptr"),
    *("num_tokens_ptr", "num_sequences_ptr"),
]


class Denominators(NamedTuple):
    """Run-time numbers of the aggregation; num_tokens < 0: the unmasked tokens of the call."""

    num_tokens: float
    num_sequences: float
    per_sequence: float  # weight of a sequence: 1, or 1 / max_completion_length
    entropy_coef: float


class Structure(NamedTuple):
    """What of an objective is compiled in; WORDS strings, then flags."""

    FORMULA: str
    ESTIMATOR: str
    ROLLOUT_LEVEL: str  # "", "token", "sequence", "geometric"
    AGGREGATE: str  # what the loss is divided by: "", "tokens", "sequences"
    CLIPS: bool = True  # clip flags are reported
    EXTRA: bool = False  # so is what cispo and vespo report
    PLUS: bool = False
    BIAS_CORRECTION: bool = False
    ROLLOUT_MASKED: bool = False
    OFF_POLICY_MASK: bool = False
    COUPLED: bool = False  # tokens depend on one another within a sequence
    SEQUENCE_RATIO: bool = False
    PER_TOKEN: bool = False  # the advantages are
    ROW_MEAN: bool = False  # each token weighs 1 / tokens of its sequence
    BONUS: bool = False  # of entropy
    METRICS: bool = True
    FLAG_MEANS: bool = False
    EXTRA_MEANS: bool = False


WORDS = 4


@triton.jit
def _store_sums(at, slots, sums, w, first, METRICS: tl.constexpr):
    """A piece's vector; a weight of the whole sequence counts once in a sum."""
    tl.store(at, tl.sum(sums.loss, 0))
    tl.store(at + 1 * slots, tl.sum(sums.count, 0))
    tl.store(at + 11 * slots, tl.sum(sums.spread, 0))
    tl.store(at + 12 * slots, tl.sum(sums.acting, 0))
    tl.store(at + 13 * slots, tl.sum(sums.acting_entropy, 0))
    if METRICS:
        _store_metrics(at, slots, sums, w, first)


@triton.jit
def _store_metrics(at, slots, sums, w, first):
    tl.store(at + 2 * slots, tl.sum(sums.kl, 0))
    tl.store(at + 3 * slots, tl.sum(sums.entropy, 0))
    tl.store(at + 4 * slots, tl.sum(sums.low, 0))
    tl.store(at + 5 * slots, tl.sum(sums.high, 0))
    tl.store(at + 6 * slots, tl.sum(sums.region, 0))
    tl.store(at + 7 * slots, tl.sum(sums.extra, 0))
    tl.store(at + 8 * slots, tl.sum(sums.gap, 0))
    tl.store(at + 9 * slots, tl.sum(sums.known, 0))
    tl.store(at + 10 * slots, tl.sum(sums.w, 0))
    tl.store(at + 14 * slots, tl.max(sums.ratio_max, 0))
    tl.store(at + 15 * slots, tl.max(sums.ratio_min, 0))
    tl.store(at + 16 * slots, tl.max(sums.gap_max, 0))
    tl.store(at + 17 * slots, tl.max(sums.w_max, 0))
    tl.store(at + 18 * slots, tl.max(sums.w_min, 0))
    if w is not None:
        tl.store(at + 10 * slots, tl.where(first, w, 0.0))
        tl.store(at + 17 * slots, w)
        tl.store(at + 18 * slots, -w)


@triton.jit
def _spread(
    s,
    dlogp_ptr,
    piece,
    total,
    shared,
    n,
    FORMULA: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the sequence shares has a gradient through every token: add its part to each."""
    for first in range(piece.row_start, piece.row_end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < piece.row_end
        part = tl.zeros((BLOCK,), tl.float32) + total / shared.tokens
        kept = flags(s.mask, i, inside)
        if FORMULA == "gmpo":
            t = token(s, piece.row, i, inside, PER_TOKEN)
            clips = gmpo_k(t.logp - t.old, t.A, n)[1]
            part = tl.where(clips, total / shared.acting, 0.0)
            kept = flags(s.acting, i, kept)
        gradient = tl.load(dlogp_ptr + i, mask=inside, other=0.0)
        tl.store(dlogp_ptr + i, gradient + tl.where(kept, part, 0.0), mask=inside)


@triton.jit
def _finish(
    loss_ptr,
    stats_ptr,
    work_ptr,
    table,
    slots,
    B,
    s,
    d,
    num_tokens_ptr,
    num_sequences_ptr,
    AGGREGATE: tl.constexpr,
    BONUS: tl.constexpr,
    METRICS: tl.constexpr,
    HAS_KL: tl.constexpr,
    CLIPS: tl.constexpr,
    EXTRA: tl.constexpr,
    ROLLOUT_LEVEL: tl.constexpr,
    FLAG_MEANS: tl.constexpr,
    EXTRA_MEANS: tl.constexpr,
):
    """The loss of the whole call, its statistics, and what backward multiplies by."""
    v, total = join_sequences(table, slots, B, ROWS=64)
    count = cell(v, COUNT)
    tokens = tl.where(d.num_tokens < 0, count, d.num_tokens)
    if num_tokens_ptr is not None:
        tokens = tl.load(num_tokens_ptr).to(tl.float32)
    sequences = d.num_sequences
    if num_sequences_ptr is not None:
        sequences = tl.load(num_sequences_ptr).to(tl.float32)
    tokens, sequences = tl.maximum(tokens, 1.0), tl.maximum(sequences, 1.0)
    by = 1.0
    if AGGREGATE == "tokens":
        by = tokens
    if AGGREGATE == "sequences":
        by = sequences / d.per_sequence
    loss = total / by
    if METRICS:
        write_statistics(
            stats_ptr,
            v,
            loss.to(tl.float32),
            B,
            HAS_KL,
            s.entropy is not None,
            CLIPS,
            EXTRA,
            ROLLOUT_LEVEL,
            FLAG_MEANS,
            EXTRA_MEANS,
        )
    tl.store(work_ptr, tl.full((), 1.0, tl.float32) / by)
    if BONUS:
        share = count / tokens
        if s.scales is not None:
            share = tl.load(num_tokens_ptr).to(tl.float32)
        each = d.entropy_coef * share / tl.maximum(cell(v, ACTING), 1.0)
        loss -= each * cell(v, ACTING_ENTROPY)
        tl.store(work_ptr + 1, -each)
    tl.store(loss_ptr, loss.to(tl.float32).to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "B", "slots"], do_not_specialize_on_alignment=_POINTERS)
def grpo_loss_kernel(
    logp_ptr,
    advantages_ptr,
    seq_ids_ptr,
    mask_ptr,
    acting_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    entropy_ptr,
    token_weights_ptr,
    scales_ptr,
    num_tokens_ptr,
    num_sequences_ptr,
    loss_ptr,
    dlogp_ptr,
    stats_ptr,
    work_ptr,
    N,
    B,
    slots,
    n,
    d,
    FORMULA: tl.constexpr,
    COUPLED: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    PLUS: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    ROLLOUT_LEVEL: tl.constexpr,
    ROLLOUT_MASKED: tl.constexpr,
    OFF_POLICY_MASK: tl.constexpr,
    AGGREGATE: tl.constexpr,
    ROW_MEAN: tl.constexpr,
    BONUS: tl.constexpr,
    METRICS: tl.constexpr,
    CLIPS: tl.constexpr,
    EXTRA: tl.constexpr,
    FLAG_MEANS: tl.constexpr,
    EXTRA_MEANS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = Streams(
        logp_ptr,
        advantages_ptr,
        mask_ptr,
        acting_ptr,
        old_ptr,
        ref_ptr,
        rollout_ptr,
        entropy_ptr,
        token_weights_ptr,
        scales_ptr,
    )
    rows = tl.maximum(B, 1)  # a call without sequences still has a program to write its zeros
    table = work_ptr + HEAD + rows
    piece = locate(seq_ids_ptr, N, rows, TILE, BLOCK)
    if (piece.index == 0) | (piece.start < piece.row_end):
        shared = shared_by(
            s,
            piece,
            n,
            FORMULA,
            ROLLOUT_LEVEL,
            ROLLOUT_MASKED,
            PER_TOKEN,
            COUPLED,
            ROW_MEAN,
            BLOCK,
        )
        sums = no_sums(BLOCK)
        for first in range(piece.start, piece.end, BLOCK):
            i = first + tl.arange(0, BLOCK)
            t = token(s, piece.row, i, i < piece.end, PER_TOKEN)
            terms = terms_of(
                s,
                t,
                i,
                shared,
                n,
                FORMULA,
                SEQUENCE_RATIO,
                ESTIMATOR,
                PLUS,
                BIAS_CORRECTION,
                ROLLOUT_LEVEL,
                ROLLOUT_MASKED,
                OFF_POLICY_MASK,
            )
            scale = tl.zeros((BLOCK,), tl.float32) + 1.0
            if ROW_MEAN:
                scale = scale / shared.tokens
            if scales_ptr is not None:
                scale = tl.load(scales_ptr + i, mask=t.kept, other=0.0).to(tl.float32)
            by_l, spread = terms.by_l, terms.by_mean
            if SEQUENCE_RATIO:
                spread = terms.by_ratio
            else:
                by_l += terms.by_ratio
            tl.store(dlogp_ptr + i, tl.where(t.kept, by_l * scale, 0.0), mask=i < piece.end)
            sums = add(sums, s, t, i, terms, scale, spread, ROLLOUT_LEVEL, BONUS)

        w = None
        if ROLLOUT_LEVEL == "sequence" or ROLLOUT_LEVEL == "geometric":
            w = shared.w
        first = piece.index == 0
        _store_sums(table + tl.program_id(0).to(tl.int64), slots, sums, w, first, METRICS)
        if last_to_arrive(work_ptr + HEAD + piece.row, piece.count):
            v = join_pieces(table, slots, piece, rows, TILE, PIECES=16)
            c = tl.arange(0, 32)
            tl.store(
                table + c * slots + piece.row,
                of_sequence(v, FLAG_MEANS, EXTRA_MEANS),
                mask=c < NUM_NAMES,
            )
            if SEQUENCE_RATIO or FORMULA == "gmpo":
                total = cell(v, SPREAD)
                _spread(s, dlogp_ptr, piece, total, shared, n, FORMULA, PER_TOKEN, BLOCK)
            if last_to_arrive(work_ptr + 2, rows):
                _finish(
                    loss_ptr,
                    stats_ptr,
                    work_ptr,
                    table,
                    slots,
                    B,
                    s,
                    d,
                    num_tokens_ptr,
                    num_sequences_ptr,
                    AGGREGATE,
                    BONUS,
                    METRICS,
                    ref_ptr is not None,
                    CLIPS,
                    EXTRA,
                    ROLLOUT_LEVEL,
                    FLAG_MEANS,
                    EXTRA_MEANS,
                )


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["dloss_ptr"])
def grpo_gradient_kernel(dloss_ptr, dlogp_ptr, work_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(dloss_ptr).to(tl.float32) * tl.load(work_ptr)
    gradient = tl.load(dlogp_ptr + i, mask=i < N, other=0.0) * by
    tl.store(out_ptr + i, gradient.to(out_ptr.dtype.element_ty), mask=i < N)
