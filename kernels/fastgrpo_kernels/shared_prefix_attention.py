# SPDX-License-Identifier: Apache-2.0
"""Attention over packed groups [prompt, completion, ...], each prompt's keys read in place.

Letters: T packed tokens, S segments, H query heads, K key/value heads, D head dimension.

The launchers and the autograd function; the algorithm is in `shared_prefix_tiles`, its kernels in
`shared_prefix_forward` and `shared_prefix_backward`. No atomics, and bitwise the same result each
time.
"""

import torch
import triton
from torch import Tensor

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch
from fastgrpo_kernels.shared_prefix_backward import (
    _shared_prefix_dkv_kernel,
    _shared_prefix_dq_kernel,
    _shared_prefix_sum_kernel,
)
from fastgrpo_kernels.shared_prefix_forward import _shared_prefix_fwd_kernel
from fastgrpo_kernels.shared_prefix_schedule import Tiles, compiled_tiles, tiles
from fastgrpo_kernels.shared_prefix_tiles import STRIDE_UNIT

SUM_ROWS = 16  # rows of a key block that one program of the sum kernel adds up


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if its rows can be read where they are, 16 bytes at a time, else a copy."""
    unit = STRIDE_UNIT.value
    strides = x.stride(2) == 1 and x.stride(0) % unit == 0 and x.stride(1) % unit == 0
    if strides and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(d) // STRIDE_UNIT.value for x in tensors for d in (0, 1)]


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))  # a tensor core multiplies 16 at least


def _constants(t: Tiles, head_dim: int, window: int, softcap: float, block_rows: int) -> dict:
    return {
        "WINDOW": window > 0,
        "SOFTCAP": softcap > 0,
        "D": head_dim,
        "PAD": _padded(head_dim),
        "TILE_M": t.m,
        "TILE_N": t.n,
        "ENTRY": block_rows,
        "num_warps": t.warps,
        "num_stages": t.stages,
        "maxnreg": t.registers,
    }


@torch.library.custom_op("fastgrpo::shared_prefix_attention", mutates_args=())
def shared_prefix_attention_op(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, items: Tensor, sums: Tensor,
    positions: Tensor, block_rows: int, slots: int, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (T, H, D), lse (H, T) float32) for tables of `fastgrpo.ops.prefix_tables`.

    lse is the log2 of the sum of exp(logit), a by-product without a gradient: asking for one
    raises. window and softcap 0 switch those features off. Deterministic.
    """
    tokens, heads, head_dim = q.shape
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    out = q.new_empty((tokens, heads, head_dim))
    lse = q.new_empty((heads, tokens), dtype=torch.float32)
    t = tiles("fwd", q.device, q.dtype, head_dim, not window and not softcap)
    launch(
        _shared_prefix_fwd_kernel, (len(blocks) * (block_rows // t.m) * heads,), q,
        q, k, v, out, lse, blocks, tokens, heads, heads // k.shape[1], *_strides(q, k, v),
        window, scale, softcap, **_constants(t, head_dim, window, softcap, block_rows),
    )  # fmt: skip
    return out, lse


@shared_prefix_attention_op.register_fake
def _(q, k, v, blocks, items, sums, positions, block_rows, slots, scale, window, softcap):
    tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("fastgrpo::shared_prefix_attention_backward", mutates_args=())
def shared_prefix_attention_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Tensor,
    items: Tensor, sums: Tensor, positions: Tensor, block_rows: int, slots: int, scale: float,
    window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) from the saved output and the log-sum-exp over prefix and own keys together."""
    q, k, v, dout = _aligned(q), _aligned(k), _aligned(v), _aligned(dout.to(q.dtype))
    numbers = (scale, window, softcap)
    dq, delta = dq_and_delta(q, k, v, out, dout, lse, blocks, block_rows, *numbers)
    tables = (items, sums, positions, block_rows, slots)
    return dq, *dk_and_dv(q, k, v, dout, lse, delta, *tables, *numbers)


def dq_and_delta(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, blocks: Tensor,
    block_rows: int, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq (T, H, D), and delta (H, T) = rowsum(dout * out), which `dk_and_dv` needs."""
    tokens, heads, head_dim = q.shape
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    t = tiles("dq", q.device, q.dtype, head_dim, not window and not softcap)
    launch(
        _shared_prefix_dq_kernel, (len(blocks) * (block_rows // t.m) * heads,), q,
        q, k, v, out, dout, lse, delta, dq, blocks, tokens, heads, heads // k.shape[1],
        *_strides(q, k, v, dout), window, scale, softcap,
        **_constants(t, head_dim, window, softcap, block_rows),
    )  # fmt: skip
    return dq, delta


def dk_and_dv(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, items: Tensor,
    sums: Tensor, positions: Tensor, block_rows: int, slots: int, scale: float, window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv (T, K, D): every work item, then the sums of the blocks that were cut."""
    tokens, kv_heads, head_dim = k.shape
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    parts = q.new_empty((2, slots, kv_heads, block_rows, head_dim), dtype=torch.float32)
    t = tiles("dkv", q.device, q.dtype, head_dim, not window and not softcap)
    launch(
        _shared_prefix_dkv_kernel, (len(items) * (block_rows // t.n) * kv_heads,), q,
        q, k, v, dout, lse, delta, dk, dv, parts, items, positions, tokens, kv_heads,
        q.shape[1] // kv_heads, slots, *_strides(q, k, v, dout), window, scale, softcap,
        **_constants(t, head_dim, window, softcap, block_rows),
    )  # fmt: skip
    launch(
        _shared_prefix_sum_kernel, (len(sums) * (block_rows // SUM_ROWS) * kv_heads,), q,
        parts, dk, dv, sums, kv_heads, slots,
        D=head_dim, PAD=_padded(head_dim), TILE=SUM_ROWS, ENTRY=block_rows,
    )  # fmt: skip
    return dk, dv


@shared_prefix_attention_backward_op.register_fake
def _(dout, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, *tables = inputs[:7]
    ctx.numbers = inputs[7:]
    ctx.save_for_backward(q, k, v, *output, *tables)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    assert dlse is None, "fastgrpo::shared_prefix_attention has no gradient through lse"
    if dout is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    grads = torch.ops.fastgrpo.shared_prefix_attention_backward(dout, *saved, *ctx.numbers)
    return (*grads, *(None,) * 9)


shared_prefix_attention_op.register_autograd(_backward, setup_context=_setup_context)


_KERNELS = {
    "fwd": _shared_prefix_fwd_kernel,
    "dq": _shared_prefix_dq_kernel,
    "dkv": _shared_prefix_dkv_kernel,
}
_POINTERS = {
    **dict.fromkeys(("table_ptr", "items_ptr", "sums_ptr", "positions_ptr"), "*i32"),
    **dict.fromkeys(("lse_ptr", "delta_ptr", "parts_ptr"), "*fp32"),
}
# Every head dimension in bfloat16; the structural flags and other dtypes at the commonest one.
_AOT_CASES = [
    *(("bf16", head_dim, 0, 0.0) for head_dim in (8, 16, 32, 64, 80, 96, 128, 256)),
    ("bf16", 128, 1, 0.0), ("bf16", 128, 0, 1.0), ("bf16", 256, 1, 1.0), ("bf16", 80, 1, 1.0),
    ("bf16", 64, 1, 1.0), ("fp16", 128, 0, 0.0), ("fp32", 128, 0, 0.0), ("fp32", 8, 0, 0.0),
]  # fmt: skip


def aot_specs() -> list[KernelSpec]:
    """The kernels on each architecture with the tiles they are given there."""
    attention = [
        aot_spec(kernel, arch, *case)
        for kernel in _KERNELS
        for arch in ("sm_80", "sm_90", "sm_100")
        for case in _AOT_CASES
    ]
    return attention + [_sum_spec(dtype) for dtype in ("bf16", "fp32")]


def aot_spec(
    kernel: str, arch: str, dtype: str, head_dim: int, window: int, softcap: float,
    t: Tiles | None = None,
) -> KernelSpec:  # fmt: skip
    """One of "fwd", "dq", "dkv" as launched on `arch`, or with the tiles `t` instead."""
    t = t or compiled_tiles(kernel, arch, dtype == "fp32", head_dim, not window and not softcap)
    constants = _constants(t, head_dim, window, softcap, 128)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    options = {"maxnreg": constants.pop("maxnreg")}
    flags = "".join(f",{n}" for n, on in (("window", window), ("softcap", softcap)) if on)
    return KernelSpec(
        _KERNELS[kernel],
        _signature(_KERNELS[kernel], dtype, constants),
        constants,
        num_warps=warps,
        num_stages=stages,
        hot=dtype != "fp32",
        matmul=True,
        label=f"{dtype},D={head_dim}{flags}",
        options=options,
        archs=(arch,),
    )


def _sum_spec(dtype: str) -> KernelSpec:
    kernel = _shared_prefix_sum_kernel
    constants = {"D": 128, "PAD": 128, "TILE": SUM_ROWS, "ENTRY": 128}
    return KernelSpec(kernel, _signature(kernel, dtype, constants), constants, label=dtype)


def _signature(kernel, dtype: str, constants: dict) -> dict[str, str]:
    names = [name for name in kernel.arg_names if name not in constants]
    return {
        name: _POINTERS.get(name, f"*{dtype}")
        if name.endswith("_ptr")
        else ("fp32" if name in ("scale", "softcap") else "i32")
        for name in names
    }
