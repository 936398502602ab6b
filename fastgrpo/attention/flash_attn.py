# SPDX-License-Identifier: Apache-2.0
"""KV-gather by the flash-attn package (2.8): one `flash_attn_varlen_func` call per layer."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from fastgrpo.attention.varlen import (
    Sequences,
    flash_unavailable,
    gathered,
    sequences,
    window_size,
)


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return flash_unavailable(device, dtype, head_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """As `dense.attend`, with K and V gathered per segment."""
    keys, values = gathered(key, value, layout)
    return varlen(query, keys, values, sequences(layout), scale, window_size(window))


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, seqs: Sequences, scale) -> Tensor:
    """Full attention inside each sequence."""
    return varlen(query, key, value, seqs, scale, (-1, -1))


def varlen(
    q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, window: tuple[int, int]
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        seqs.cu_q,
        seqs.cu_k,
        seqs.max_q,
        seqs.max_k,
        softmax_scale=scale,
        causal=window[1] == 0,
        window_size=window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
