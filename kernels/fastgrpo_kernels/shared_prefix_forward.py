# SPDX-License-Identifier: Apache-2.0
"""Forward kernel of shared-prefix attention: online softmax over a query's virtual keys."""

import triton
import triton.language as tl

from fastgrpo_kernels.shared_prefix_tiles import (
    STRIDE_UNIT,
    key_range,
    load_tile,
    logits_of_keys,
    query_block,
    store_tile,
)

UNSEEN = tl.constexpr(-1.0e30)  # finite start of the running maximum: exp2(-inf - UNSEEN) is 0


@triton.jit
def _attend(
    acc, top, total, q, k_ptr, v_ptr, low, high, q_pos,
    seg_start, prefix_start, prefix_len, stride_k, stride_v, window, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over virtual keys [low, high): new accumulator, running maximum and sum."""
    for start in range(low, high, TILE_N):
        rows, live, _, s, seen = logits_of_keys(
            q, k_ptr, start, high, seg_start, prefix_start, prefix_len, stride_k, q_pos,
            window, scale, softcap, MASKED, WINDOW, SOFTCAP, D, PAD, TILE_N,
        )  # fmt: skip
        if MASKED:
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, rows, stride_v, live, D, PAD, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=[
    "tokens", "heads", "group", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "stride_vt", "stride_vh", "window",
], do_not_specialize_on_alignment=["table_ptr"])  # fmt: skip
def _shared_prefix_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, tokens, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, window, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """out (T, H, D), and lse (H, T): log2 of the sum of exp2 of the logits in units of log 2."""
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    start, seg_start, seg_end, prefix_start, prefix_len = query_block(
        table_ptr, pid // heads, TILE_M, ENTRY
    )
    if start >= seg_end:
        return
    rows = start + tl.arange(0, TILE_M)
    live = rows < seg_end
    q = load_tile(q_ptr + h * stride_qh * STRIDE_UNIT, rows, stride_qt, live, D, PAD, True)
    k_ptr += (h // group) * stride_kh * STRIDE_UNIT
    v_ptr += (h // group) * stride_vh * STRIDE_UNIT
    q_pos, low, full, high = key_range(
        start, seg_start, seg_end, prefix_len, window, TILE_M, TILE_N, WINDOW
    )
    acc = tl.zeros((TILE_M, PAD), tl.float32)
    top = tl.full((TILE_M,), UNSEEN, tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    for masked in tl.static_range(1 if WINDOW else 0, 2):
        acc, top, total = _attend(
            acc, top, total, q, k_ptr, v_ptr, full if masked else low, high if masked else full,
            q_pos, seg_start, prefix_start, prefix_len, stride_kt, stride_vt,
            window, scale, softcap, masked == 1, WINDOW, SOFTCAP, D, PAD, TILE_N,
        )  # fmt: skip
    store_tile(out_ptr + h * D, rows, heads * D, acc / total[:, None], live, D, PAD)
    tl.store(lse_ptr + h * tokens + rows, top + tl.log2(total), mask=live)
