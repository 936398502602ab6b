# SPDX-License-Identifier: Apache-2.0
"""The pixels of many images as one tensor, without a copy where they lie in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join(pieces: Sequence[Tensor]) -> Tensor:
    """`torch.cat(pieces)`; pieces of one tensor that follow one another in it are a view of it."""
    if len(pieces) == 1:
        return pieces[0]
    lying = neighbours(pieces)
    return torch.cat(pieces) if lying is None else lying


def neighbours(pieces: Sequence[Tensor]) -> Tensor | None:
    """The rows of a contiguous tensor that these pieces of it are, in order; None for others."""
    whole = pieces[0]._base
    if whole is None or not whole.is_contiguous() or whole.numel() == 0:
        return None
    first, rest = divmod(pieces[0].storage_offset() - whole.storage_offset(), whole.stride(0))
    stop = first
    for piece in pieces:
        offset = whole.storage_offset() + stop * whole.stride(0)
        same_rows = piece.shape[1:] == whole.shape[1:] and piece.stride() == whole.stride()
        if rest or piece._base is not whole or not same_rows or piece.storage_offset() != offset:
            return None
        stop += len(piece)
    return whole[first:stop]
