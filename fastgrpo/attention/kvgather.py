"""Each segment attends to gathered keys: its prompt's, then its own, causal from the bottom right.

On a GPU this is one variable-length call (see `varlen`); here segments of similar size are padded
to one batch and given to PyTorch's attention, a few calls per layer whatever the number of
segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


class GatherRows(torch.autograd.Function):
    """x[index] along dim 0. The gradient of a row taken many times is summed in float32: G bfloat16
    additions into a prompt's keys would lose half of their digits."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dout: Tensor):
        (index,) = ctx.saved_tensors
        wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
        dx = torch.zeros(ctx.rows, *dout.shape[1:], dtype=wide, device=dout.device)
        return dx.index_add_(0, index, dout.to(wide)).to(dout.dtype), None


class Batch(NamedTuple):
    """n segments padded to Q queries and K keys; `mask` None means plain causal, no padding."""

    count: int
    query_index: Tensor  # (n * Q,)
    key_index: Tensor  # (n * K,)
    mask: Tensor | None  # (n, 1, Q, K) bool


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """As `dense.attend`; work and memory grow with the sum of (segment x its keys)."""
    batches, restore = _plan(layout, window)
    outs = []
    for batch in batches:
        q = _batched(query.index_select(0, batch.query_index), batch.count, 1)
        repeat = query.shape[1] // key.shape[1]
        k = _batched(GatherRows.apply(key, batch.key_index), batch.count, repeat)
        v = _batched(GatherRows.apply(value, batch.key_index), batch.count, repeat)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=batch.mask, is_causal=batch.mask is None, scale=scale
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, restore)


def _batched(x: Tensor, count: int, repeat: int) -> Tensor:
    """(n * L, K, D) -> (n, K * repeat, L, D)"""
    x = x.unflatten(0, (count, -1)).transpose(1, 2)
    return x if repeat == 1 else x.repeat_interleave(repeat, 1)


def _plan(layout, window: int | None) -> tuple[list[Batch], Tensor]:
    """The batches, and for each token of the row its place in their concatenated outputs."""
    key = ("kvgather", window)
    if key not in layout.cache:
        buckets: dict[tuple, list[tuple[int, int, int, int]]] = {}
        for start, end, prefix_start, prefix_end in layout.segments:
            queries, prefix = end - start, prefix_end - prefix_start
            if queries:
                # segments within a factor of two of each other share a padded batch
                size = (prefix > 0, queries.bit_length(), (prefix + queries).bit_length())
                buckets.setdefault(size, []).append((start, queries, prefix_start, prefix))
        device = layout.kv_index.device
        restore = torch.empty(layout.total, dtype=torch.int64)
        batches, offset = [], 0
        for segments in buckets.values():
            batch, place = _batch(torch.tensor(segments), window)
            restore[place[:, 0]] = place[:, 1] + offset
            offset += batch.query_index.numel()
            batches.append(Batch(*(x.to(device) if torch.is_tensor(x) else x for x in batch)))
        layout.cache[key] = batches, restore.to(device)
    return layout.cache[key]


def _batch(segments: Tensor, window: int | None) -> tuple[Batch, Tensor]:
    start, queries, prefix_start, prefix = segments.T[:, :, None]  # (n, 1) each
    keys = prefix + queries
    i = torch.arange(int(queries.max()))[None]  # (1, Q)
    j = torch.arange(int(keys.max()))[None]  # (1, K)
    real = i < queries
    row = torch.minimum(i, queries - 1)  # padding repeats the last query; its output is not read
    query_index = (start + row).reshape(-1)
    key_index = torch.where(
        j < prefix, prefix_start + j, start + torch.minimum(j, keys - 1) - prefix
    )
    text_pos = (prefix + row)[:, :, None]
    mask = j[:, None] <= text_pos
    if window is not None:
        mask &= text_pos - j[:, None] < window
    plain = window is None and not prefix.any() and bool(real.all())
    place = torch.arange(real.numel())[real.reshape(-1)]
    places = torch.stack([query_index[place], place], 1)
    mask = None if plain else mask[:, None]
    return Batch(len(segments), query_index, key_index.reshape(-1), mask), places
