# SPDX-License-Identifier: Apache-2.0
"""What autocast does to the inputs of a stock layer, for what takes such a layer's place."""

from __future__ import annotations

import torch
from torch import Tensor


def under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as a stock linear layer or attention casts them: to autocast's dtype where it is
    on, all but those in float64."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
