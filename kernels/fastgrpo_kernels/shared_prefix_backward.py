# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of shared-prefix attention: dq; dk and dv by work items; the sum of their parts.

A prompt's keys are seen by every row from the key to the end of its group, under every query head
that shares them. One program would sum all of that while most of the GPU waits, so the (head, row)
pairs of a key block with much to sum are cut into equal shares (`fastgrpo.ops.prefix_tables`): each
writes a float32 part, and `_shared_prefix_sum_kernel` adds the parts of a block in their order. No
atomics: bitwise the same result each time.
"""

import triton
import triton.language as tl

from fastgrpo_kernels.shared_prefix_tiles import (
    KEY_ITEM,
    KEY_SUM,
    STRIDE_UNIT,
    capped,
    key_range,
    load_tile,
    logits_of_keys,
    query_block,
    store_tile,
    through_cap,
)


@triton.jit
def _dq_loop(
    dq, q, dout, lse, delta, k_ptr, v_ptr, low, high, q_pos,
    seg_start, prefix_start, prefix_len, stride_k, stride_v, window, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """dq / scale over virtual keys [low, high)."""
    for start in range(low, high, TILE_N):
        rows, live, k, x, seen = logits_of_keys(
            q, k_ptr, start, high, seg_start, prefix_start, prefix_len, stride_k, q_pos,
            window, scale, softcap, MASKED, WINDOW, SOFTCAP, D, PAD, TILE_N,
        )  # fmt: skip
        v = load_tile(v_ptr, rows, stride_v, live, D, PAD, MASKED)
        p = tl.exp2(x - lse[:, None])
        if MASKED:
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
        ds = through_cap(p * (dp - delta[:, None]), x, softcap, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@triton.jit(do_not_specialize=[
    "tokens", "heads", "group", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "stride_vt", "stride_vh", "stride_ot", "stride_oh", "window",
], do_not_specialize_on_alignment=["table_ptr"])  # fmt: skip
def _shared_prefix_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr,
    tokens, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    window, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(dout * out) for the kernel that follows."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    start, seg_start, seg_end, prefix_start, prefix_len = query_block(
        table_ptr, pid // heads, TILE_M, ENTRY
    )
    if start >= seg_end:
        return
    rows = start + tl.arange(0, TILE_M)
    live = rows < seg_end
    dout = load_tile(dout_ptr + h * stride_oh * STRIDE_UNIT, rows, stride_ot, live, D, PAD, True)
    out = load_tile(out_ptr + h * D, rows, heads * D // STRIDE_UNIT, live, D, PAD, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + h * tokens + rows, delta, mask=live)
    q = load_tile(q_ptr + h * stride_qh * STRIDE_UNIT, rows, stride_qt, live, D, PAD, True)
    lse = tl.load(lse_ptr + h * tokens + rows, mask=live, other=0.0)
    k_ptr += (h // group) * stride_kh * STRIDE_UNIT
    v_ptr += (h // group) * stride_vh * STRIDE_UNIT
    q_pos, low, full, high = key_range(
        start, seg_start, seg_end, prefix_len, window, TILE_M, TILE_N, WINDOW
    )
    dq = tl.zeros((TILE_M, PAD), tl.float32)
    for masked in tl.static_range(1 if WINDOW else 0, 2):
        dq = _dq_loop(
            dq, q, dout, lse, delta, k_ptr, v_ptr, full if masked else low,
            high if masked else full, q_pos, seg_start, prefix_start, prefix_len,
            stride_kt, stride_vt, window, scale, softcap,
            masked == 1, WINDOW, SOFTCAP, D, PAD, TILE_N,
        )  # fmt: skip
    store_tile(dq_ptr + h * D, rows, heads * D, dq * scale, live, D, PAD)


@triton.jit
def _dkv_loop(
    dk, dv, k, v, k_rows, q_ptr, dout_ptr, lse_ptr, delta_ptr, positions_ptr, q_start, q_end,
    k_pos, last_pos, stride_q, stride_o, window, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of one key tile over query rows [q_start, q_end) of one head.

    Rows from q_end on read lse = +inf, hence p = 0: they need no mask of their own.
    """
    for start in range(q_start, q_end, TILE_M):
        rows = start + tl.arange(0, TILE_M)
        live = rows < q_end
        near = True
        if WINDOW:
            q_pos = tl.load(positions_ptr + rows, mask=live, other=2147483647)
            near = tl.min(q_pos, 0) - window < last_pos
        if near:
            q = load_tile(q_ptr, rows, stride_q, live, D, PAD, True)
            lse = tl.load(lse_ptr + rows, mask=live, other=float("inf"))
            s = tl.dot(k, tl.trans(q), input_precision="tf32x3")
            x = capped(s, scale, softcap, SOFTCAP)
            p = tl.exp2(x - lse[None, :])
            p = tl.where(k_rows[:, None] <= rows[None, :], p, 0.0)
            if WINDOW:
                p = tl.where(k_pos[:, None] > q_pos[None, :] - window, p, 0.0)
            dout = load_tile(dout_ptr, rows, stride_o, live, D, PAD, True)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="tf32x3")
            delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision="tf32x3")
            ds = through_cap(p * (dp - delta[None, :]), x, softcap, SOFTCAP)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit
def _cut(share, shares, span, group, ENTRY: tl.constexpr):
    """Where share i of n of (query head, row) pairs begins: the head, and the row within it, a
    multiple of ENTRY. Share i ends where share i + 1 begins."""
    at = span.to(tl.int64) * group * share // shares
    return (at // span).to(tl.int32), (at % span // ENTRY * ENTRY).to(tl.int32)


@triton.jit(do_not_specialize=[
    "tokens", "kv_heads", "group", "slots", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "stride_vt", "stride_vh", "stride_ot", "stride_oh", "window",
], do_not_specialize_on_alignment=["items_ptr", "positions_ptr"])  # fmt: skip
def _shared_prefix_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, parts_ptr, items_ptr,
    positions_ptr, tokens, kv_heads, group, slots,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    window, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """One work item: dk and dv of a key tile over its share of (query head, row) pairs; whole sums
    into dk and dv (T, K, D), parts into parts (2, slots, K, ENTRY, D) float32."""
    pid = tl.program_id(0)
    kv = (pid % kv_heads).to(tl.int64)
    item = items_ptr + (pid // kv_heads // (ENTRY // TILE_N)) * KEY_ITEM
    within = (pid // kv_heads % (ENTRY // TILE_N)) * TILE_N
    start = tl.load(item) + within
    seg_end = tl.load(item + 1)
    if start >= seg_end:
        return
    rows = start + tl.arange(0, TILE_N)
    live = rows < seg_end
    k = load_tile(k_ptr + kv * stride_kh * STRIDE_UNIT, rows, stride_kt, live, D, PAD, True)
    v = load_tile(v_ptr + kv * stride_vh * STRIDE_UNIT, rows, stride_vt, live, D, PAD, True)
    shift = tl.load(item + 2)  # text position = row + shift
    last_pos = tl.minimum(start + TILE_N, seg_end) - 1 + shift
    block = start - within
    span = tl.load(item + 3) - block  # query rows of one head
    first_head, first_row = _cut(tl.load(item + 4), tl.load(item + 5), span, group, ENTRY)
    last_head, last_row = _cut(tl.load(item + 4) + 1, tl.load(item + 5), span, group, ENTRY)
    slot = tl.load(item + 6)

    dk = tl.zeros((TILE_N, PAD), tl.float32)
    dv = tl.zeros((TILE_N, PAD), tl.float32)
    for nth in range(first_head, tl.minimum(last_head + 1, group)):
        q_start = tl.maximum(block + tl.where(nth == first_head, first_row, 0), start)
        q_end = block + tl.where(nth == last_head, last_row, span)
        h = kv * group + nth
        dk, dv = _dkv_loop(
            dk, dv, k, v, rows, q_ptr + h * stride_qh * STRIDE_UNIT,
            dout_ptr + h * stride_oh * STRIDE_UNIT, lse_ptr + h * tokens, delta_ptr + h * tokens,
            positions_ptr, q_start, q_end, rows + shift, last_pos, stride_qt, stride_ot,
            window, scale, softcap, WINDOW, SOFTCAP, D, PAD, TILE_M,
        )  # fmt: skip
    if slot < 0:
        store_tile(dk_ptr + kv * D, rows, kv_heads * D, dk * scale, live, D, PAD)
        store_tile(dv_ptr + kv * D, rows, kv_heads * D, dv, live, D, PAD)
    else:
        part = parts_ptr + ((slot * kv_heads + kv) * ENTRY + within) * D
        own = tl.arange(0, TILE_N)
        store_tile(part, own, D, dk * scale, live, D, PAD)
        store_tile(part + kv_heads.to(tl.int64) * slots * ENTRY * D, own, D, dv, live, D, PAD)


@triton.jit(do_not_specialize=["kv_heads", "slots"], do_not_specialize_on_alignment=["sums_ptr"])
def _shared_prefix_sum_kernel(
    parts_ptr, dk_ptr, dv_ptr, sums_ptr, kv_heads, slots,
    D: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """dk and dv of the key blocks that were cut: their parts added in order of their slots."""
    pid = tl.program_id(0)
    kv = (pid % kv_heads).to(tl.int64)
    block = sums_ptr + (pid // kv_heads // (ENTRY // TILE)) * KEY_SUM
    own = (pid // kv_heads % (ENTRY // TILE)) * TILE + tl.arange(0, TILE)
    rows = tl.load(block) + own
    live = rows < tl.load(block + 1)
    first = tl.load(block + 2)
    end = first + tl.load(block + 3)
    dims = tl.arange(0, PAD)
    mask = live[:, None] & (dims[None, :] < D)
    for which in tl.static_range(2):
        base = parts_ptr + which * kv_heads.to(tl.int64) * slots * ENTRY * D
        total = tl.zeros((TILE, PAD), tl.float32)
        for slot in range(first, end):
            part = base + (slot * kv_heads + kv) * ENTRY * D
            total += tl.load(part + own[:, None] * D + dims[None, :], mask=mask, other=0.0)
        out_ptr = dv_ptr if which else dk_ptr
        store_tile(out_ptr + kv * D, rows, kv_heads * D, total, live, D, PAD)
