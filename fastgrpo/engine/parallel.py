# SPDX-License-Identifier: Apache-2.0
"""Models spread over processes: what is collective.

DDP keeps the whole model in every process. FSDP2 and ZeRO-3 keep shards, and gather a module's
weights when it is called: a forward is then a collective that every process must enter the same
number of times.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def distributed() -> bool:
    """Whether there are other processes."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def busiest(count: int, device: torch.device) -> int:
    """The largest `count` of all processes; a collective where there are several."""
    if not distributed():
        return count
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def is_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps the parameters in shards."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def fsdp2_units(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP2 gathers one by one, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
