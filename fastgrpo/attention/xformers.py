# SPDX-License-Identifier: Apache-2.0
"""Split attention by xformers: own keys and prefix keys apart, merged by log-sum-exp.

No key is copied. Each part's backward uses the merged output and log-sum-exp, which makes the
gradients exact without a gradient through the log-sum-exp (flash-attn and torch drop that one in
silence); xformers' merge passes both on, so only its own merge function may join the parts.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.attention.varlen import flash_unavailable
from fastgrpo.errors import InputError


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    return flash_unavailable(device, dtype, head_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None) -> Tensor:
    """As `dense.attend`; no sliding window, which a split cannot express."""
    if window is not None:
        raise InputError("backend='xformers' has no sliding window; use 'triton' or 'flash_attn'")
    from xformers.ops.fmha import attn_bias, merge_training

    def part(rows, key_rows, bias):
        q, k, v = query[None, rows], key[None, key_rows], value[None, key_rows]
        share = q.shape[2] // k.shape[2]
        if share > 1:
            k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
        return merge_training.memory_efficient_attention_partial_autograd(
            q, k, v, bias, scale=scale
        )

    plan = _plan(layout, attn_bias)
    merge = merge_training.merge_attentions_autograd
    outs = []
    if plan.alone is not None:
        outs.append(merge(part(plan.alone, plan.alone, plan.alone_bias)))
    if plan.sharing is not None:
        own = part(plan.sharing, plan.sharing, plan.sharing_bias)
        prefix = part(plan.sharing, plan.prefix, plan.prefix_bias)
        outs.append(merge(own, prefix))
    return torch.cat(outs, 1)[0].index_select(0, plan.restore)


class Plan(NamedTuple):
    """Rows without a prefix, rows with one, the prefixes' rows, and the masks of the three calls.

    `restore` puts the outputs of "alone" and then "sharing" rows back in the row's order.
    """

    alone: Tensor | None
    alone_bias: object
    sharing: Tensor | None
    sharing_bias: object
    prefix: Tensor | None
    prefix_bias: object
    restore: Tensor


def _plan(layout, attn_bias) -> Plan:
    if "xformers" not in layout.cache:
        device = layout.kv_index.device
        alone = [(s, e) for s, e, ps, pe in layout.segments if ps == pe and e > s]
        sharing = [(s, e) for s, e, ps, pe in layout.segments if pe > ps and e > s]
        per_prefix: dict[tuple[int, int], int] = {}
        for s, e, ps, pe in layout.segments:
            if pe > ps and e > s:
                per_prefix[ps, pe] = per_prefix.get((ps, pe), 0) + e - s
        causal = attn_bias.BlockDiagonalCausalMask.from_seqlens
        order = torch.cat([_rows(alone), _rows(sharing)])
        layout.cache["xformers"] = Plan(
            alone=_rows(alone).to(device) if alone else None,
            alone_bias=causal(_lengths(alone), device=device) if alone else None,
            sharing=_rows(sharing).to(device) if sharing else None,
            sharing_bias=causal(_lengths(sharing), device=device) if sharing else None,
            prefix=_rows(per_prefix).to(device) if sharing else None,
            prefix_bias=attn_bias.BlockDiagonalMask.from_seqlens(
                list(per_prefix.values()), _lengths(per_prefix), device=device
            )
            if sharing
            else None,
            restore=torch.argsort(order).to(device),
        )
    return layout.cache["xformers"]


def _rows(spans) -> Tensor:
    return torch.cat([torch.arange(start, end) for start, end in spans] + [torch.arange(0)])


def _lengths(spans) -> list[int]:
    return [end - start for start, end in spans]
