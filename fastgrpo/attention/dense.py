# SPDX-License-Identifier: Apache-2.0
"""Attention by an explicit (T, T) mask: the definition the other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """softmax(scale * Q K^T + mask) V per head. query (T, H, D), key and value (T, K, D), K
    dividing H; (T, H, D). Memory grows with T^2."""
    repeat = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # (H, T, D)
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = (q @ k.transpose(1, 2)) * scale
    scores = scores.masked_fill(~layout.dense_mask(window), float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, -1, dtype=wide).to(q.dtype)
    return (weights @ v).transpose(0, 1)
