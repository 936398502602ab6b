# SPDX-License-Identifier: Apache-2.0
"""Keys gathered per segment for one variable-length call: what flash-attn and torch share.

Each segment's keys are its prompt's, then its own. Both libraries align a causal mask to the
bottom right of (queries, keys), which is exactly that pattern; a sliding window counts from the
same corner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.ops.gather_rows import gather_rows, row_index


class Sequences(NamedTuple):
    """Bounds of the sequences of a variable-length call, int32, and the longest lengths."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def flash_unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why no flash kernel serves these inputs, or None."""
    if device.type != "cuda":
        return f"flash kernels need a CUDA device, the model is on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"flash kernels need compute capability 8.0, {device} is older"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash kernels take float16 or bfloat16, the model is in {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"flash kernels take head dimensions up to 256, multiples of 8, not {head_dim}"
    return None


def gathered(key: Tensor, value: Tensor, layout) -> tuple[Tensor, Tensor]:
    """Keys and values in segment order. A prompt row is taken once per completion; its gradient
    is summed in float32 in a fixed order, not added up in bfloat16."""
    if "kv_rows" not in layout.cache:
        layout.cache["kv_rows"] = row_index(layout.kv_index, layout.total)
    rows = layout.cache["kv_rows"]
    return gather_rows(key, rows), gather_rows(value, rows)


def sequences(layout) -> Sequences:
    return Sequences(layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)


def window_size(window: int | None) -> tuple[int, int]:
    """(left, right) keys beside the diagonal: a window of W keys includes the query's own."""
    return (-1, 0) if window is None else (window - 1, 0)


def blocks(bounds: Tensor, longest: int | None = None) -> Sequences:
    """The sequences between consecutive `bounds`, each attending to itself (vision towers)."""
    if longest is None:
        longest = int((bounds[1:] - bounds[:-1]).max())
    bounds = bounds.to(torch.int32)
    return Sequences(bounds, bounds, longest, longest)
