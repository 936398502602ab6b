# SPDX-License-Identifier: Apache-2.0
"""Models spread over processes: what is collective, and how their weights become whole.

DDP keeps the whole model in every process. FSDP2 and ZeRO-3 keep shards, and gather a module's
weights when it is called: a forward is then a collective that every process must enter the same
number of times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
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


def in_shards(model: nn.Module) -> bool:
    """Whether each process keeps a shard of the weights: a module's call is a collective then."""
    return bool(fsdp2_units(model)) or is_zero3(model)


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, an FSDP2 model's weights are whole in every process and its forwards not collective.

    For generation, which ends at different steps on different processes: gathered once here, by
    all of them, in place of once per layer and token. Needs the memory of the whole model. A
    model that is not sharded by FSDP2 is left alone.
    """
    units = fsdp2_units(model)
    groups = [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group)]
    kept = [group.post_forward_mesh_info for group in groups]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group, info in zip(groups, kept, strict=True):
            group.post_forward_mesh_info = info
        for unit in units:
            unit.reshard()


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies whole tensors, the same in every process, into the model's parameters by name."""
    if is_zero3(model):
        import deepspeed

        parameters = dict(model.named_parameters())
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0),
        ):
            for name, weight in weights.items():
                if name in parameters and parameters[name].numel():
                    parameters[name].copy_(weight)
        return
    if fsdp2_units(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
        return
    model.load_state_dict(weights)
