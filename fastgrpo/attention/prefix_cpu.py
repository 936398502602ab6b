# SPDX-License-Identifier: Apache-2.0
"""A prompt's keys read once for all its completions, by PyTorch's flash attention on the CPU.

A completion's attention has two parts, its prompt's keys and its own. All completions of a group
take the first part in one call without a mask, all segments the second in a few causal ones, and
the parts are merged by their log-sum-exps:

    lse = log(exp(lse_far) + exp(lse_near)),   out = sum_i exp(lse_i - lse) out_i

Backward gives each part the merged out and lse, from which its share of the gradients is exact. No
key is gathered or repeated. Letters: T packed tokens, H query heads, K key heads, R = H / K, D head
size, n segments of Q tokens in a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.attention import kvgather

# (n, H, Q, D) outputs and (n, H, Q) log-sum-exps
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cpu":
        return f"it is for the CPU, the model is on {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"it merges parts in the model's dtype, float32 or float64, not {dtype}"
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """As `dense.attend`; a sliding window takes `kvgather`."""
    if window is not None:
        return kvgather.attend(query, key, value, layout, scale=scale, window=window)
    return _Attention.apply(query, key, value, _plan(layout), scale)


class Prefix(NamedTuple):
    """Bounds in the row: a prompt, and its completions, which follow it."""

    start: int
    end: int
    last: int


class Batch(NamedTuple):
    """n segments padded to Q tokens: `rows` (n * Q,), padding repeats a segment's last; `real`
    where in it the tokens `rows[real]` are, None without padding."""

    count: int
    rows: Tensor
    real: Tensor | None

    def padded(self, x: Tensor) -> Tensor:
        """(T, H, D) -> (n, H, Q, D)"""
        return x.index_select(0, self.rows).unflatten(0, (self.count, -1)).transpose(1, 2)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, H, Q, ...) -> the packed tokens, and their values (tokens, H, ...)."""
        x = x.transpose(1, 2).flatten(0, 1)
        return (self.rows, x) if self.real is None else (self.rows[self.real], x[self.real])


class Plan(NamedTuple):
    prefixes: list[Prefix]
    batches: list[Batch]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan: Plan, scale):
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:2])
        for batch in plan.batches:
            part = _flash(*map(batch.padded, (query, key, value)), 0.0, True, scale=scale)
            for whole, x in zip((out, lse), part, strict=True):
                whole.index_copy_(0, *batch.tokens(x))
        for prefix in plan.prefixes:
            prompt, rest = slice(prefix.start, prefix.end), slice(prefix.end, prefix.last)
            far = _flash(*_folded(query[rest], key[prompt], value[prompt]), scale=scale)
            far_out, far_lse = (_unfolded(x, query.shape[1]) for x in far)
            merged = torch.logaddexp(lse[rest], far_lse)
            out[rest] *= torch.exp(lse[rest] - merged)[..., None]
            out[rest] += far_out * torch.exp(far_lse - merged)[..., None]
            lse[rest] = merged
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        query, key, value, out, lse = ctx.saved_tensors
        dquery, dkey, dvalue = map(torch.zeros_like, (query, key, value))
        for batch in ctx.plan.batches:
            given = [batch.padded(x) for x in (dout, query, key, value, out)]
            if batch.real is not None:  # padding sends nothing back
                kept = torch.zeros(len(batch.rows), dtype=torch.bool)
                kept[batch.real] = True
                given[0] = given[0].masked_fill(~kept.view(batch.count, 1, -1, 1), 0.0)
            grads = _flash_backward(*given, batch.padded(lse), 0.0, True, scale=ctx.scale)
            for whole, x in zip((dquery, dkey, dvalue), grads, strict=True):
                whole.index_copy_(0, *batch.tokens(_of_heads(x, whole.shape[1])))
        for prefix in ctx.plan.prefixes:
            prompt, rest = slice(prefix.start, prefix.end), slice(prefix.end, prefix.last)
            keys = key.shape[1]
            q, k, v = _folded(query[rest], key[prompt], value[prompt])
            do, o = (_fold(x[rest], keys) for x in (dout, out))
            grads = _flash_backward(
                do, q, k, v, o, _fold(lse[rest], keys), 0.0, False, scale=ctx.scale
            )
            dquery[rest] += _unfolded(grads[0], query.shape[1])
            for whole, x in zip((dkey, dvalue), grads[1:], strict=True):
                whole[prompt] += x[0].transpose(0, 1)
        return dquery, dkey, dvalue, None, None


def _folded(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """(1, K, tokens * R, D) queries and (1, K, prompt, D) keys and values: heads that share keys
    are rows of one."""
    return [_fold(query, key.shape[1]), *(x.transpose(0, 1)[None] for x in (key, value))]


def _fold(x: Tensor, keys: int) -> Tensor:
    """(tokens, H, ...) -> (1, K, tokens * R, ...)"""
    return x.unflatten(1, (keys, -1)).transpose(0, 1).flatten(1, 2)[None]


def _unfolded(x: Tensor, heads: int) -> Tensor:
    """(1, K, tokens * R, ...) -> (tokens, H, ...)"""
    share = heads // x.shape[1]
    return x[0].unflatten(1, (-1, share)).transpose(0, 1).flatten(1, 2)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """(n, H, Q, D) gradients of keys as the query heads saw them -> (n, K, Q, D)."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def _plan(layout) -> Plan:
    key = "prefix_cpu"
    if key not in layout.cache:
        prefixes: list[Prefix] = []
        buckets: dict[int, list[tuple[int, int]]] = {}
        for start, end, prefix_start, prefix_end in layout.segments:
            if end > start and (prefix_end > prefix_start or not layout.continued):
                # segments within a factor of two of each other share a padded batch
                buckets.setdefault((end - start).bit_length(), []).append((start, end - start))
            if end > start and prefix_end > prefix_start:
                first = prefix_start
                if prefixes and prefixes[-1].start == first:
                    prefixes[-1] = prefixes[-1]._replace(last=end)
                else:
                    prefixes.append(Prefix(first, prefix_end, end))
        layout.cache[key] = Plan(prefixes, [_batch(torch.tensor(x)) for x in buckets.values()])
    return layout.cache[key]


def _batch(segments: Tensor) -> Batch:
    start, length = segments.T[:, :, None]  # (n, 1) each
    column = torch.arange(int(length.max()))[None]
    rows = (start + torch.minimum(column, length - 1)).reshape(-1)
    real = (column < length).reshape(-1)
    return Batch(len(segments), rows, None if bool(real.all()) else real.nonzero()[:, 0])
