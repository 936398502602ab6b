"""Attention over packed groups [prompt, completion, ...], each prompt's keys read in place.

Letters: T packed tokens, S segments, H query heads, K key/value heads, D head dimension.

A completion attends to the *virtual* sequence "its prefix, then itself". Key j of that sequence
lies in row `prefix_start + j` for j < prefix_len and in row `seg_start + j - prefix_len` after, so
one loop over j with that row map is the whole algorithm: nothing is gathered, and causal masking
and the sliding window are plain comparisons of j with the query's text position. In the backward
pass a prompt's keys are seen by every row from the key to the end of the group, so one program
sums a key block's gradient over all completions and query heads in fp32 registers: no atomics, and
bitwise the same result each time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNSEEN = tl.constexpr(-1.0e30)  # finite start of the running maximum: exp2(-inf - UNSEEN) is 0

STRIDE_UNIT = tl.constexpr(8)  # strides come in 8 elements, so that loads are known to be aligned


@triton.jit
def _entry(table_ptr, pid, TILE: tl.constexpr, ENTRY: tl.constexpr):
    """First row of this program's tile and the five numbers of its segment."""
    entry = table_ptr + (pid // (ENTRY // TILE)) * 6
    start = tl.load(entry) + (pid % (ENTRY // TILE)) * TILE
    return (
        start,
        tl.load(entry + 1),
        tl.load(entry + 2),
        tl.load(entry + 3),
        tl.load(entry + 4),
        tl.load(entry + 5),
    )


@triton.jit
def _tile(ptr, rows, stride, bound, D: tl.constexpr, PAD: tl.constexpr, CHECK: tl.constexpr):
    """Rows of a (T, D) matrix as a (rows, PAD) tile; zeros beyond `bound` and beyond D."""
    dims = tl.arange(0, PAD)
    at = ptr + rows.to(tl.int64)[:, None] * (stride * STRIDE_UNIT) + dims[None, :]
    if CHECK:
        live = (bound[:, None]) & (dims[None, :] < D)
        return tl.load(at, mask=live, other=0.0)
    if D != PAD:
        return tl.load(at, mask=dims[None, :] < D, other=0.0)
    return tl.load(at)


@triton.jit
def _store_tile(ptr, rows, stride, value, live, D: tl.constexpr, PAD: tl.constexpr):
    dims = tl.arange(0, PAD)
    at = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=live[:, None] & (dims[None, :] < D))


@triton.jit
def _capped(s, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits in units of log 2 from raw dot products."""
    if SOFTCAP:
        return (2.0 * tl.sigmoid(s * (2.0 * scale / softcap)) - 1.0) * (softcap * LOG2E)
    return s * (scale * LOG2E)


@triton.jit
def _through_cap(ds, x, softcap, SOFTCAP: tl.constexpr):
    """Gradient with respect to scale * s, given the one with respect to the capped logit x ln 2."""
    if SOFTCAP:
        t = x * (LN2 / softcap)
        return ds * (1.0 - t * t)
    return ds


@triton.jit
def _visible(q_pos, k_pos, window, WINDOW: tl.constexpr):
    seen = k_pos <= q_pos
    if WINDOW:
        seen = seen & (k_pos > q_pos - window)
    return seen


@triton.jit
def _key_rows(j, seg_start, prefix_start, prefix_len):
    return j + tl.where(j < prefix_len, prefix_start, seg_start - prefix_len)


@triton.jit
def _key_range(first, last, window, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Queries at positions first..last see keys [low, full) without a mask, [full, high) with."""
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // TILE * TILE
        return low, low, last + 1
    return 0, (first + 1) // TILE * TILE, last + 1


@triton.jit
def _attend(
    acc, top, total, q, k_ptr, v_ptr, low, high, q_pos,
    seg_start, prefix_start, prefix_len, stride_k, stride_v, window, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over virtual keys [low, high): new accumulator, running maximum and sum."""
    for start in range(low, high, TILE_N):
        j = start + tl.arange(0, TILE_N)
        rows = _key_rows(j, seg_start, prefix_start, prefix_len)
        k = _tile(k_ptr, rows, stride_k, j < high, D, PAD, MASKED)
        s = _capped(tl.dot(q, tl.trans(k), input_precision="tf32x3"), scale, softcap, SOFTCAP)
        if MASKED:
            s = tl.where(_visible(q_pos[:, None], j[None, :], window, WINDOW), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = _tile(v_ptr, rows, stride_v, j < high, D, PAD, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=[
    "tokens", "heads", "group", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "stride_vt", "stride_vh", "window",
])  # fmt: skip
def _shared_prefix_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, tokens, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, window, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = (pid % heads).to(tl.int64)
    start, seg_start, seg_end, prefix_start, prefix_len, _ = _entry(
        table_ptr, pid // heads, TILE_M, ENTRY
    )
    if start >= seg_end:
        return
    rows = start + tl.arange(0, TILE_M)
    live = rows < seg_end
    q = _tile(q_ptr + h * stride_qh * STRIDE_UNIT, rows, stride_qt, live, D, PAD, True)
    k_ptr += (h // group) * stride_kh * STRIDE_UNIT
    v_ptr += (h // group) * stride_vh * STRIDE_UNIT

    shift = prefix_len - seg_start  # text position = row + shift
    q_pos = rows + shift
    low, full, high = _key_range(
        start + shift, tl.minimum(start + TILE_M, seg_end) - 1 + shift, window, TILE_N, WINDOW
    )
    acc = tl.zeros((TILE_M, PAD), tl.float32)
    top = tl.full((TILE_M,), UNSEEN, tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    if not WINDOW:
        acc, top, total = _attend(
            acc, top, total, q, k_ptr, v_ptr, low, full, q_pos,
            seg_start, prefix_start, prefix_len, stride_kt, stride_vt, window, scale, softcap,
            False, WINDOW, SOFTCAP, D, PAD, TILE_N,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_ptr, v_ptr, full, high, q_pos,
        seg_start, prefix_start, prefix_len, stride_kt, stride_vt, window, scale, softcap,
        True, WINDOW, SOFTCAP, D, PAD, TILE_N,
    )  # fmt: skip
    _store_tile(out_ptr + h * D, rows, heads * D, acc / total[:, None], live, D, PAD)
    tl.store(lse_ptr + h * tokens + rows, (top + tl.log2(total)) * LN2, mask=live)


@triton.jit
def _dq_loop(
    dq, q, dout, lse2, delta, k_ptr, v_ptr, low, high, q_pos,
    seg_start, prefix_start, prefix_len, stride_k, stride_v, window, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """dq / scale over virtual keys [low, high)."""
    for start in range(low, high, TILE_N):
        j = start + tl.arange(0, TILE_N)
        rows = _key_rows(j, seg_start, prefix_start, prefix_len)
        k = _tile(k_ptr, rows, stride_k, j < high, D, PAD, MASKED)
        v = _tile(v_ptr, rows, stride_v, j < high, D, PAD, MASKED)
        x = _capped(tl.dot(q, tl.trans(k), input_precision="tf32x3"), scale, softcap, SOFTCAP)
        p = tl.exp2(x - lse2[:, None])
        if MASKED:
            p = tl.where(_visible(q_pos[:, None], j[None, :], window, WINDOW), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
        ds = _through_cap(p * (dp - delta[:, None]), x, softcap, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@triton.jit(do_not_specialize=[
    "tokens", "heads", "group", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "stride_vt", "stride_vh", "stride_ot", "stride_oh", "window",
])  # fmt: skip
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
    start, seg_start, seg_end, prefix_start, prefix_len, _ = _entry(
        table_ptr, pid // heads, TILE_M, ENTRY
    )
    if start >= seg_end:
        return
    rows = start + tl.arange(0, TILE_M)
    live = rows < seg_end
    dout = _tile(dout_ptr + h * stride_oh * STRIDE_UNIT, rows, stride_ot, live, D, PAD, True)
    out = _tile(out_ptr + h * D, rows, heads * D // STRIDE_UNIT, live, D, PAD, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + h * tokens + rows, delta, mask=live)
    q = _tile(q_ptr + h * stride_qh * STRIDE_UNIT, rows, stride_qt, live, D, PAD, True)
    lse2 = tl.load(lse_ptr + h * tokens + rows, mask=live, other=0.0) * LOG2E
    k_ptr += (h // group) * stride_kh * STRIDE_UNIT
    v_ptr += (h // group) * stride_vh * STRIDE_UNIT

    shift = prefix_len - seg_start
    q_pos = rows + shift
    low, full, high = _key_range(
        start + shift, tl.minimum(start + TILE_M, seg_end) - 1 + shift, window, TILE_N, WINDOW
    )
    dq = tl.zeros((TILE_M, PAD), tl.float32)
    if not WINDOW:
        dq = _dq_loop(
            dq, q, dout, lse2, delta, k_ptr, v_ptr, low, full, q_pos,
            seg_start, prefix_start, prefix_len, stride_kt, stride_vt, window, scale, softcap,
            False, WINDOW, SOFTCAP, D, PAD, TILE_N,
        )  # fmt: skip
    dq = _dq_loop(
        dq, q, dout, lse2, delta, k_ptr, v_ptr, full, high, q_pos,
        seg_start, prefix_start, prefix_len, stride_kt, stride_vt, window, scale, softcap,
        True, WINDOW, SOFTCAP, D, PAD, TILE_N,
    )  # fmt: skip
    _store_tile(dq_ptr + h * D, rows, heads * D, dq * scale, live, D, PAD)


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
            q = _tile(q_ptr, rows, stride_q, live, D, PAD, True)
            lse2 = tl.load(lse_ptr + rows, mask=live, other=float("inf")) * LOG2E
            s = tl.dot(k, tl.trans(q), input_precision="tf32x3")
            x = _capped(s, scale, softcap, SOFTCAP)
            p = tl.exp2(x - lse2[None, :])
            p = tl.where(k_rows[:, None] <= rows[None, :], p, 0.0)
            if WINDOW:
                p = tl.where(k_pos[:, None] > q_pos[None, :] - window, p, 0.0)
            dout = _tile(dout_ptr, rows, stride_o, live, D, PAD, True)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="tf32x3")
            delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision="tf32x3")
            ds = _through_cap(p * (dp - delta[None, :]), x, softcap, SOFTCAP)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit(do_not_specialize=[
    "tokens", "kv_heads", "group", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "stride_vt", "stride_vh", "stride_ot", "stride_oh", "window",
])  # fmt: skip
def _shared_prefix_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr, positions_ptr,
    tokens, kv_heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    window, scale, softcap,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv = (pid % kv_heads).to(tl.int64)
    start, seg_start, seg_end, _, prefix_len, q_end = _entry(
        table_ptr, pid // kv_heads, TILE_N, ENTRY
    )
    if start >= seg_end:
        return
    rows = start + tl.arange(0, TILE_N)
    live = rows < seg_end
    k = _tile(k_ptr + kv * stride_kh * STRIDE_UNIT, rows, stride_kt, live, D, PAD, True)
    v = _tile(v_ptr + kv * stride_vh * STRIDE_UNIT, rows, stride_vt, live, D, PAD, True)
    k_pos = rows + (prefix_len - seg_start)
    last_pos = tl.minimum(start + TILE_N, seg_end) - 1 + prefix_len - seg_start

    dk = tl.zeros((TILE_N, PAD), tl.float32)
    dv = tl.zeros((TILE_N, PAD), tl.float32)
    for h in range(kv * group, (kv + 1) * group):
        dk, dv = _dkv_loop(
            dk, dv, k, v, rows, q_ptr + h * stride_qh * STRIDE_UNIT,
            dout_ptr + h * stride_oh * STRIDE_UNIT, lse_ptr + h * tokens, delta_ptr + h * tokens,
            positions_ptr, start, q_end, k_pos, last_pos, stride_qt, stride_ot,
            window, scale, softcap, WINDOW, SOFTCAP, D, PAD, TILE_M,
        )  # fmt: skip
    _store_tile(dk_ptr + kv * D, rows, kv_heads * D, dk * scale, live, D, PAD)
    _store_tile(dv_ptr + kv * D, rows, kv_heads * D, dv, live, D, PAD)


class Tiles(NamedTuple):
    """Launch configuration of one kernel."""

    m: int  # query rows
    n: int  # keys
    warps: int
    stages: int


# Chosen without a GPU: the largest tiles that compile without spilling a register by triton 3.6 and
# 3.9, with two stages of loads where shared memory and registers allow. Columns: head dimension up
# to 64, below 128 (padded to it), 128, above. sm_80's rows also fit the 99 KiB of shared memory of
# consumer cards. `fastgrpo doctor --compile` prints registers and spills.
TILES = {  # (m, n, warps, stages)
    "fwd sm_80": ((128, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "fwd sm_90": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "fwd sm_100": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "dq sm_80": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    "dq sm_90": ((128, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "dq sm_100": ((128, 64, 8, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "dkv sm_80": ((64, 32, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    "dkv sm_90": ((64, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 2)),
    "dkv sm_100": ((64, 64, 8, 2), (32, 64, 4, 1), (64, 64, 8, 1), (32, 32, 8, 2)),
}
# float32 multiplies by three TF32 products on the tensor cores, which takes more registers.
TILES_FP32 = {"fwd": Tiles(32, 32, 4, 1), "dq": Tiles(32, 16, 8, 1), "dkv": Tiles(16, 16, 8, 1)}
TILES_FP32_WIDE = Tiles(16, 16, 8, 1)
INTERPRETED = Tiles(32, 16, 4, 1)  # unequal, so that mixed-up tile sizes show in the tests


def tiles(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, plain: bool
) -> Tiles:
    """The configuration of `kernel` ("fwd", "dq", "dkv"), fixed by the inputs' kind, not size.

    plain: neither a sliding window nor a softcap.
    """
    if device.type != "cuda":
        return INTERPRETED
    major = torch.cuda.get_device_capability(device)[0]
    arch = {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")
    return _compiled_tiles(kernel, arch, dtype == torch.float32, head_dim, plain)


def _compiled_tiles(kernel: str, arch: str, fp32: bool, head_dim: int, plain: bool) -> Tiles:
    if fp32:
        return TILES_FP32[kernel] if head_dim <= 128 else TILES_FP32_WIDE
    column = (head_dim > 64) + (head_dim >= 128) + (head_dim > 128)
    t = Tiles(*TILES[f"{kernel} {arch}"][column])
    if kernel == "dkv" and not plain:  # their registers are taken from the keys
        return t._replace(n=min(t.n, 64))
    return t


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if its rows can be read where they are, else a contiguous copy."""
    unit = STRIDE_UNIT.value
    fine = x.stride(2) == 1 and x.stride(0) % unit == 0 and x.stride(1) % unit == 0
    return x if fine else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(d) // STRIDE_UNIT.value for x in tensors for d in (0, 1)]


def _constants(t: Tiles, head_dim: int, window: int, softcap: float, block_rows: int) -> dict:
    return {
        "WINDOW": window > 0,
        "SOFTCAP": softcap > 0,
        "D": head_dim,
        "PAD": triton.next_power_of_2(head_dim),
        "TILE_M": t.m,
        "TILE_N": t.n,
        "ENTRY": block_rows,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }


@torch.library.custom_op("fastgrpo::shared_prefix_attention", mutates_args=())
def shared_prefix_attention_op(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, positions: Tensor, block_rows: int,
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (T, H, D), lse (H, T) float32) for tables of `fastgrpo.ops.prefix_tables`.

    window and softcap 0 switch those features off. lse is a by-product without a gradient: asking
    for one raises. Deterministic.
    """
    tokens, heads, head_dim = q.shape
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    out = q.new_empty((tokens, heads, head_dim))
    lse = q.new_empty((heads, tokens), dtype=torch.float32)
    t = tiles("fwd", q.device, q.dtype, head_dim, not window and not softcap)
    programs = blocks.shape[1] * (block_rows // t.m) * heads
    launch(
        _shared_prefix_fwd_kernel, (programs,), q,
        q, k, v, out, lse, blocks[0], tokens, heads, heads // k.shape[1], *_strides(q, k, v),
        window, scale, softcap, **_constants(t, head_dim, window, softcap, block_rows),
    )  # fmt: skip
    return out, lse


@shared_prefix_attention_op.register_fake
def _(q, k, v, blocks, positions, block_rows, scale, window, softcap):
    tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("fastgrpo::shared_prefix_attention_backward", mutates_args=())
def shared_prefix_attention_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Tensor,
    positions: Tensor, block_rows: int, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) from the saved output and the log-sum-exp over prefix and own keys together."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q, k, v, dout = _aligned(q), _aligned(k), _aligned(v), _aligned(dout.to(q.dtype))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strides = _strides(q, k, v, dout)
    kind = (q.device, q.dtype, head_dim, not window and not softcap)
    t = tiles("dq", *kind)
    programs = blocks.shape[1] * (block_rows // t.m) * heads
    launch(
        _shared_prefix_dq_kernel, (programs,), q,
        q, k, v, out, dout, lse, delta, dq, blocks[0], tokens, heads, group, *strides,
        window, scale, softcap, **_constants(t, head_dim, window, softcap, block_rows),
    )  # fmt: skip
    t = tiles("dkv", *kind)
    launch(
        _shared_prefix_dkv_kernel, (blocks.shape[1] * (block_rows // t.n) * kv_heads,), q,
        q, k, v, dout, lse, delta, dk, dv, blocks[1], positions, tokens, kv_heads, group, *strides,
        window, scale, softcap, **_constants(t, head_dim, window, softcap, block_rows),
    )  # fmt: skip
    return dq, dk, dv


@shared_prefix_attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, blocks, positions, block_rows, scale, window, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, blocks, positions, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, blocks, positions)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    assert dlse is None, "fastgrpo::shared_prefix_attention has no gradient through lse"
    q, k, v, out, lse, blocks, positions = ctx.saved_tensors
    if dout is None:
        return (None,) * 9
    grads = torch.ops.fastgrpo.shared_prefix_attention_backward(
        dout, q, k, v, out, lse, blocks, positions, *ctx.numbers
    )
    return (*grads, None, None, None, None, None, None)


shared_prefix_attention_op.register_autograd(_backward, setup_context=_setup_context)


_KERNELS = {
    "fwd": _shared_prefix_fwd_kernel,
    "dq": _shared_prefix_dq_kernel,
    "dkv": _shared_prefix_dkv_kernel,
}
_POINTERS = {"table_ptr": "*i32", "positions_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
# Every head dimension in bfloat16; the structural flags and other dtypes at the commonest one.
_AOT_CASES = [
    *(("bf16", head_dim, window, softcap) for head_dim in (64, 80, 96, 128, 256)
      for window, softcap in ((0, 0.0),)),
    ("bf16", 128, 1, 0.0), ("bf16", 128, 0, 1.0), ("bf16", 256, 1, 1.0), ("bf16", 80, 1, 1.0),
    ("bf16", 64, 1, 1.0), ("fp16", 128, 0, 0.0), ("fp32", 128, 0, 0.0),
]  # fmt: skip


def aot_specs() -> list[KernelSpec]:
    """The three kernels on each architecture with the tiles it is given there."""
    return [
        _aot_spec(kernel, arch, *case)
        for kernel in _KERNELS
        for arch in ("sm_80", "sm_90", "sm_100")
        for case in _AOT_CASES
    ]


def _aot_spec(
    kernel: str, arch: str, dtype: str, head_dim: int, window: int, softcap: float
) -> KernelSpec:
    t = _compiled_tiles(kernel, arch, dtype == "fp32", head_dim, not window and not softcap)
    constants = _constants(t, head_dim, window, softcap, 128)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    signature = {}
    for name in _KERNELS[kernel].arg_names:
        if name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, f"*{dtype}")
        elif name not in constants:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
    flags = "".join(f",{n}" for n, on in (("window", window), ("softcap", softcap)) if on)
    return KernelSpec(
        _KERNELS[kernel],
        signature,
        constants,
        num_warps=warps,
        num_stages=stages,
        hot=dtype != "fp32",
        matmul=True,
        label=f"{dtype},D={head_dim}{flags}",
        archs=(arch,),
    )
