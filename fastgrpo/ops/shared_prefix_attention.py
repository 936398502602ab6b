# SPDX-License-Identifier: Apache-2.0
"""shared_prefix_attention: attention over packed groups, each prompt stored and read once.

Letters: T packed tokens, S segments, H query heads, K key/value heads, D head dimension.
"""

import torch

from fastgrpo.checks import check_positive, check_tensor
from fastgrpo.errors import InputError
from fastgrpo.ops.prefix_tables import PrefixTables, prefix_tables
from fastgrpo.ops.select import select
from fastgrpo.reference import shared_prefix_attention as reference

__all__ = ["PrefixTables", "prefix_tables", "shared_prefix_attention", "unsupported"]

MAX_HEAD_DIM = 256


def unsupported(dtype: torch.dtype, head_dim: int) -> str | None:
    """What the kernel takes, if that leaves these inputs out; else None."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 or bfloat16, got {dtype}"
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        return f"takes head dimensions that are multiples of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
    return None


def shared_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: PrefixTables,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Causal attention in which every completion also sees its group's prompt, stored once.

    out[t] = sum_j softmax_j(cap(scale q[t] . k[j])) v[j] over the rows j that t sees: its prompt
    whole and its own segment up to t; cap(x) = softcap tanh(x / softcap) when given.

    q (T, H, D), k and v (T, K, D) with K dividing H, on one device, of one floating dtype; tables
    from `prefix_tables`. scale defaults to D**-0.5. window W: only keys less than W text positions
    back. Returns (T, H, D), differentiable in q, k and v; a prompt's dk and dv are summed over its
    completions in float32. impl "triton" (float32, float16, bfloat16; D <= 256 and a multiple of 8;
    deterministic; on a GPU float32 by three TF32 products, about three times plain float32's error)
    or "reference" (any floating dtype, O(H T^2) memory). Raises InputError.
    """
    sizes: dict[str, int] = {}
    check_tensor("q", q, "T H D", like=sizes, floating=True)
    check_tensor("k", k, "T K D", like=sizes, dtypes=(q.dtype,), device=q.device)
    check_tensor("v", v, "T K D", like=sizes, dtypes=(q.dtype,), device=q.device)
    check_tensor("tables.positions", tables.positions, "T", like=sizes, device=q.device)
    if sizes["K"] == 0 or sizes["H"] % sizes["K"]:
        raise InputError(
            f"k: expected a number of heads that divides q's {sizes['H']}, got {sizes['K']}"
        )
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise InputError(f"window: expected an integer >= 1 or None, got {window!r}")
    if softcap is not None:
        check_positive("softcap", softcap)
    scale = sizes["D"] ** -0.5 if scale is None else scale
    check_positive("scale", scale)
    reason = unsupported(q.dtype, sizes["D"])
    impl = select(
        "shared_prefix_attention", q.device, "reference" if impl is None and reason else impl
    )
    if impl == "reference":
        return reference.shared_prefix_attention(q, k, v, tables.segments, scale, window, softcap)
    if reason:
        raise InputError(f"impl: the triton kernel {reason}; ask for impl='reference'")
    from fastgrpo_kernels.shared_prefix_attention import shared_prefix_attention_op

    out, _ = shared_prefix_attention_op(q, k, v, *tables[1:], scale, window or 0, softcap or 0.0)
    return out
