# SPDX-License-Identifier: Apache-2.0
"""Vision-tower attention for all images and windows in one variable-length call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastgrpo.attention import flash_attn, torch_varlen
from fastgrpo.attention.varlen import blocks
from fastgrpo.ops.autocast import under_autocast


def vision_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    **kwargs,
):
    """The AttentionInterface function for a tower whose blocks pass `cu_seq_lens_q`.

    query, key, value (1, H, T, D); tokens between two consecutive bounds see each other and no one
    else. Returns (1, T, H, D) and None.
    """
    inputs = under_autocast(query[0], key[0], value[0])
    q, k, v = (x.transpose(0, 1) for x in inputs)  # (T, H, D)
    varlen = varlen_provider(q.device, q.dtype, q.shape[-1])
    if varlen is None:
        return block_attention(q, k, v, cu_seq_lens_q, scale=scaling)[None], None
    longest = None if max_length_q is None else int(max_length_q)
    return varlen(q, k, v, blocks(cu_seq_lens_q, longest), scaling)[None], None


@functools.cache
def varlen_provider(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable | None:
    """`attend_blocks` of the first library with a variable-length kernel for these inputs."""
    for library in (flash_attn, torch_varlen):
        if library.unavailable(device, dtype, head_dim) is None:
            return library.attend_blocks
    return None


def block_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *, scale: float) -> Tensor:
    """Full attention inside each block of `bounds` (S + 1,): one batched call per distinct length.

    q, k, v (T, H, D) -> (T, H, D).
    """
    bounds = bounds.cpu().to(torch.int64)
    lengths = bounds[1:] - bounds[:-1]
    kinds = [length for length in lengths.unique().tolist() if length]
    if len(kinds) == 1:  # blocks alike and in order: nothing is gathered
        return _attend_blocks(q, k, v, kinds[0], scale)
    outs, order = [], []
    for length in kinds:
        starts = bounds[:-1][lengths == length]
        index = (starts[:, None] + torch.arange(length)).reshape(-1)
        order.append(index)
        index = index.to(q.device)
        inputs = (t.index_select(0, index) for t in (q, k, v))
        outs.append(_attend_blocks(*inputs, length, scale))
    restore = torch.argsort(torch.cat(order)).to(q.device)
    return torch.cat(outs).index_select(0, restore)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> Tensor:
    """Full attention inside each run of `length` tokens."""
    x, y, z = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    out = scaled_dot_product_attention(x, y, z, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)
