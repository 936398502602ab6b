# SPDX-License-Identifier: Apache-2.0
"""Shared-prefix attention in plain PyTorch: the definition, by a dense mask.

Letters: T packed tokens, S segments, H query heads, K key/value heads, D head dimension.
"""

import torch


def visible_keys(segments: torch.Tensor, tokens: int, window: int | None = None) -> torch.Tensor:
    """(T, T) bool: row i, column j is True where the token in row i attends to the one in row j.

    segments (S, 4) int64: start, end, prefix_start, prefix_end. A row sees its prefix whole and
    its own segment up to itself; with a window W only keys less than W text positions back.
    """
    start, end, prefix_start, prefix_end = segments.unbind(1)
    row = torch.arange(tokens, device=segments.device)
    of = torch.repeat_interleave(
        torch.arange(len(segments), device=segments.device), end - start, output_size=tokens
    )
    position = row - start[of] + (prefix_end - prefix_start)[of]
    own = (of[:, None] == of[None, :]) & (row[:, None] >= row[None, :])
    prefix = (prefix_start[of][:, None] <= row[None, :]) & (row[None, :] < prefix_end[of][:, None])
    seen = own | prefix
    if window is not None:
        seen &= position[None, :] > position[:, None] - window
    return seen


def shared_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(cap(scale q k^T) where visible) v, (T, H, D); k, v (T, K, D) serve H/K heads each.

    Computed in float32, or in float64 for float64 inputs. O(H T^2) memory.
    """
    tokens, heads, _ = q.shape
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    share = heads // k.shape[1]
    queries, keys, values = (
        x.to(compute).transpose(0, 1)
        for x in (q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1))
    )
    logits = scale * (queries @ keys.transpose(1, 2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = visible_keys(segments, tokens, window)
    weights = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1)
    return (weights @ values).transpose(0, 1).to(q.dtype)
