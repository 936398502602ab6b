# SPDX-License-Identifier: Apache-2.0
"""Own kernel: each prompt's keys are read where they lie, for all of its completions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.ops.select import why_not
from fastgrpo.ops.shared_prefix_attention import (
    PrefixTables,
    prefix_tables,
    shared_prefix_attention,
    unsupported,
)


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return why_not("shared_prefix_attention", "triton", device) or unsupported(dtype, head_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """As `dense.attend`; no gather and no (T, T) mask, bitwise repeatable gradients."""
    tables = _tables(layout, (query.shape[1], key.shape[1]))
    return shared_prefix_attention(
        query, key, value, tables, scale=scale, window=window, impl="triton"
    )


def _tables(layout, heads: tuple[int, int]) -> PrefixTables:
    found = layout.cache.setdefault("prefix_tables", {})
    if heads not in found:
        segments = torch.tensor(layout.segments, dtype=torch.int64, device="cpu")
        found[heads] = prefix_tables(segments, layout.kv_index.device, heads=heads)
    return found[heads]
