# SPDX-License-Identifier: Apache-2.0
"""A causal depthwise convolution of tokens in rows: a product of each of its few taps.

On a CPU a library's convolution wants channels in rows and is several times slower. Letters: L
tokens, C channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def depthwise(row: Tensor, weight: Tensor) -> Tensor:
    """out_t = sum_w weight_w row_{t + w}, (L - W + 1, C), of row (L, C) and weight (C, W).

    Differentiable once in both.
    """
    return _Depthwise.apply(row, weight.T.contiguous())


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row, weight):
        ctx.save_for_backward(row, weight)
        taps, count = len(weight), len(row) - len(weight) + 1
        out = row[:count] * weight[0]
        for tap in range(1, taps):
            out.addcmul_(row[tap : tap + count], weight[tap])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        row, weight = ctx.saved_tensors
        drow, dweight, product = torch.zeros_like(row), torch.empty_like(weight), None
        for tap in range(len(weight)):
            here = slice(tap, tap + len(dout))
            drow[here].addcmul_(dout, weight[tap])
            product = torch.mul(dout, row[here], out=product)
            torch.sum(product, 0, out=dweight[tap])
        return drow, dweight
