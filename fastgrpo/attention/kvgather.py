# SPDX-License-Identifier: Apache-2.0
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

from fastgrpo.ops.gather_rows import RowIndex, gather_rows, row_index


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


class Batch(NamedTuple):
    """n segments padded to Q queries and K keys; `mask` None means plain causal, no padding."""

    count: int
    query_index: Tensor  # (n * Q,)
    keys: RowIndex  # (n * K,)
    mask: Tensor | None  # (n, 1, Q, K) bool


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """As `dense.attend`; work and memory grow with the sum of (segment x its keys)."""
    batches, restore = _plan(layout, window)
    outs = []
    for batch in batches:
        q = _batched(query.index_select(0, batch.query_index), batch.count, 1)
        repeat = query.shape[1] // key.shape[1]
        k = _batched(gather_rows(key, batch.keys), batch.count, repeat)
        v = _batched(gather_rows(value, batch.keys), batch.count, repeat)
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
        restore = torch.empty(layout.total, dtype=torch.int64)
        batches, offset = [], 0
        for segments in buckets.values():
            batch, tokens, places = _batch(torch.tensor(segments), window, layout)
            restore[tokens] = places + offset
            offset += batch.query_index.numel()
            batches.append(batch)
        layout.cache[key] = batches, restore.to(layout.kv_index.device)
    return layout.cache[key]


def _batch(segments: Tensor, window: int | None, layout) -> tuple[Batch, Tensor, Tensor]:
    """A batch, and which packed token's output is at which of its n * Q places."""
    start, queries, prefix_start, prefix = segments.T[:, :, None]  # (n, 1) each
    keys = prefix + queries
    i = torch.arange(int(queries.max()))[None]  # (1, Q)
    j = torch.arange(int(keys.max()))[None]  # (1, K)
    real = i < queries
    row = torch.minimum(i, queries - 1)  # padding repeats the last query; its output is not read
    query_index = start + row
    own = start + torch.minimum(j, keys - 1) - prefix
    key_index = torch.where(j < prefix, prefix_start + j, own).reshape(-1)
    text_pos = (prefix + row)[:, :, None]
    mask = j[:, None] <= text_pos
    if window is not None:
        mask &= text_pos - j[:, None] < window
    blocks = layout.has_blocks(window)
    if blocks:
        block = layout.block_ids().cpu()
        of_query, of_key = block[query_index], block[key_index.view(len(segments), -1)]
        same = (of_query[:, :, None] == of_key[:, None]) & (of_query >= 0)[:, :, None]
        if layout.local_blocks:
            same &= text_pos - j[:, None] < window
        mask = mask | (same & (j < keys)[:, None])
    plain = window is None and not prefix.any() and bool(real.all()) and not blocks
    device = layout.kv_index.device
    batch = Batch(
        len(segments),
        query_index.reshape(-1).to(device),
        row_index(key_index.to(device), layout.total),
        None if plain else mask[:, None].to(device),
    )
    return batch, query_index[real], real.reshape(-1).nonzero()[:, 0]
