"""Own kernel: each prompt's keys are read where they lie, for all of its completions."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from fastgrpo.ops.shared_prefix_attention import (
    MAX_HEAD_DIM,
    PrefixTables,
    prefix_tables,
    shared_prefix_attention,
)


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, the model is on {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 or bfloat16, the model is in {dtype}"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"takes head dimensions that are multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """As `dense.attend`; no gather and no (T, T) mask, bitwise repeatable gradients."""
    return shared_prefix_attention(
        query, key, value, _tables(layout), scale=scale, window=window, impl="triton"
    )


def _tables(layout) -> PrefixTables:
    if "prefix_tables" not in layout.cache:
        segments = torch.tensor(layout.segments, dtype=torch.int64)
        layout.cache["prefix_tables"] = prefix_tables(segments, layout.kv_index.device)
    return layout.cache["prefix_tables"]
