"""shared_prefix_attention: attention over packed groups, each prompt stored and read once.

Letters: T packed tokens, S segments, H query heads, K key/value heads, D head dimension.
"""

from typing import NamedTuple

import torch

from fastgrpo.checks import check_positive, check_tensor
from fastgrpo.errors import InputError
from fastgrpo.ops.select import select
from fastgrpo.reference import shared_prefix_attention as reference

BLOCK_ROWS = 128  # rows of one entry of the work table; the kernels' tiles divide it
MAX_HEAD_DIM = 256


class PrefixTables(NamedTuple):
    """A layout as the kernels read it, built once per layout by `prefix_tables`.

    segments (S, 4) int64: start, end, prefix_start, prefix_end of each run of rows.
    blocks (2, B, 6) int32: entries start, seg_start, seg_end, prefix_start, prefix_len, query_end
    of at most BLOCK_ROWS rows, heaviest first: [0] ordered for queries, [1] for keys.
    positions (T,) int32: text position of each row (a completion continues its prompt's).
    """

    segments: torch.Tensor
    blocks: torch.Tensor
    positions: torch.Tensor


def prefix_tables(segments: torch.Tensor, device: torch.device | str | None = None) -> PrefixTables:
    """The tables of a packed row of groups [prompt, completion, ...].

    segments (S, 4) int64: start, end, prefix_start, prefix_end. Segments tile the rows in order
    and may be empty. A completion's prefix is a whole earlier segment that itself has none, with
    nothing between the two but other completions of it; a prompt has prefix_start == prefix_end.
    Raises InputError naming the segment that breaks this. Reads `segments` on the host: build
    tables once per layout, not per layer.
    """
    check_tensor("segments", segments, "S 4", dtypes=(torch.int64, torch.int32))
    device = segments.device if device is None else device
    seg = segments.detach().to("cpu", torch.int64)
    owner = _check_segments(seg)
    start, end, prefix_start, prefix_end = seg.unbind(1)
    length, prefix_len = end - start, prefix_end - prefix_start
    # Rows from a prompt's key to the end of its group see that key: one run, no gaps.
    query_end = end.clone()
    query_end.scatter_reduce_(0, owner, end, "amax")

    each = torch.arange(len(seg), device="cpu")
    count = (length + BLOCK_ROWS - 1) // BLOCK_ROWS
    of = torch.repeat_interleave(each, count)
    nth = torch.arange(len(of), device="cpu") - (torch.cumsum(count, 0) - count)[of]
    row = start[of] + nth * BLOCK_ROWS
    table = torch.stack(
        [row, start[of], end[of], prefix_start[of], prefix_len[of], query_end[of]], 1
    )
    by_query = torch.argsort(prefix_len[of] + row - start[of], descending=True, stable=True)
    by_key = torch.argsort(query_end[of] - row, descending=True, stable=True)
    token = torch.repeat_interleave(each, length)
    positions = torch.arange(len(token), device="cpu") - start[token] + prefix_len[token]
    return PrefixTables(
        segments=seg.to(device),
        blocks=torch.stack([table[by_query], table[by_key]]).to(device, torch.int32),
        positions=positions.to(device, torch.int32),
    )


def _check_segments(seg: torch.Tensor) -> torch.Tensor:
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
    deterministic) or "reference" (any floating dtype, O(H T^2) memory). Raises InputError.
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

    out, _ = shared_prefix_attention_op(
        q, k, v, tables.blocks, tables.positions, BLOCK_ROWS, scale, window or 0, softcap or 0.0
    )
    return out
