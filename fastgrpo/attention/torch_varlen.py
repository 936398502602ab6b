# SPDX-License-Identifier: Apache-2.0
"""KV-gather by `torch.nn.attention.varlen.varlen_attn`: one call per layer, nothing to install."""

from __future__ import annotations

import functools
import importlib.util
import inspect

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
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return flash_unavailable(device, dtype, head_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """As `dense.attend`, with K and V gathered per segment."""
    keys, values = gathered(key, value, layout)
    return varlen(query, keys, values, sequences(layout), scale, window_size(window))


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, seqs: Sequences, scale) -> Tensor:
    """Full attention inside each sequence."""
    return varlen(query, key, value, seqs, scale, (-1, -1))


@functools.cache
def _has_gqa() -> bool:
    """torch 2.11 has no `enable_gqa` and documents equal head counts only; later ones have it."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen(
    q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, window: tuple[int, int]
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    share = q.shape[1] // k.shape[1]
    options = {}
    if share > 1 and _has_gqa():
        options["enable_gqa"] = True
    elif share > 1:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    return varlen_attn(
        q,
        k,
        v,
        seqs.cu_q,
        seqs.cu_k,
        seqs.max_q,
        seqs.max_k,
        scale=scale,
        window_size=window,
        **options,
    )
