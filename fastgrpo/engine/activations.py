# SPDX-License-Identifier: Apache-2.0
"""Which layers of a checkpointing model keep their activations in a packed row's forward.

Activation checkpointing keeps every layer's input and computes the layer again in backward, so that
the padded step fits into memory. A packed row has a fraction of its tokens: in the same memory some
layers, the last ones, keep their activations and are not computed again. The gradients are the
same.

Letters, of the decoder and of the tower each: n tokens of the row, r times as many in the padded
step, x and a the bytes of a layer's input and activations.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgrpo.engine.parallel import in_shards
from fastgrpo.models.adapter import Adapter
from fastgrpo.ops.linear.memory import free_bytes
from fastgrpo.packing.row import PackedRow
from fastgrpo.packing.vision import FeatureStore

_FREE_SHARE = 0.5  # of the memory that is free, at most

Kind = tuple  # layers of one kind have the same modules and shapes


@dataclass(frozen=True)
class Cost:
    """Bytes of a layer's input x and of its activations a, per unit of its stack."""

    given: float
    kept: float


@dataclass(frozen=True)
class Stack:
    """The checkpointed layers of the decoder or of the tower in a row's forward.

    `units`: n, in tokens or numbers of an image; `padded`: r n, those of the plain forward, in
    which every completion has its own prompt and images and is as long as the longest.
    """

    layers: list[nn.Module]
    units: int
    padded: int

    @cached_property
    def kinds(self) -> list[Kind]:
        return [_kind(layer) for layer in self.layers]


_costs: weakref.WeakKeyDictionary[nn.Module, dict[Kind, Cost]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def kept_activations(adapter: Adapter, row: PackedRow, store: FeatureStore) -> Iterator[float]:
    """Inside, a forward of `row` with gradient recomputes only what takes more memory than the
    padded step that recomputes everything, and `row.spare`, or than half of what is free. Yields
    the bytes that are left, for what goes on from this row.

    A layer's bytes are measured in the first forward that runs one of its kind. Reentrant
    checkpointing, compiled models, and weights in shards, where a layer's call is a collective,
    are left as they are.
    """
    serves = torch.is_grad_enabled() and trains_as_it_is(adapter)
    stacks = _stacks(adapter, row, store) if serves else []
    costs = _costs.setdefault(adapter.core, {})
    kept, left = [], 0.0
    if stacks:
        free = _FREE_SHARE * free_bytes(adapter.device)
        kept, left = layers_to_keep(stacks, costs, free, row.spare)
    last = {
        kind: (layer, stack.units)
        for stack in stacks
        for kind, layer in zip(stack.kinds, stack.layers, strict=True)
        if kind not in costs
    }
    unknown = {kind: (_Measured(layer), units) for kind, (layer, units) in last.items()}
    kept += [meter.layer for meter, _ in unknown.values()]
    for layer in kept:
        layer.gradient_checkpointing = False
    try:
        yield left
    finally:
        for layer in kept:
            layer.gradient_checkpointing = True
        for meter, _ in unknown.values():
            meter.remove()
    for kind, (meter, units) in unknown.items():
        if meter.ran:
            costs[kind] = Cost(meter.given / units, meter.kept / units)


def layers_to_keep(
    stacks: list[Stack], costs: dict[Kind, Cost], available: float, spare: float = 0.0
) -> tuple[list[nn.Module], float]:
    """The last layers whose activations fit beside the inputs of the others, and the bytes left.

    With sum x over a stack's layers and a of its largest, the padded step holds at most

        max_s (sum over this stack and those before it of r n x + r n_s a_s),

    the row that recomputes everything sum n x + max_s n_s a_s, and each kept layer adds n (a - x).
    There may be `spare` bytes more, and `available` at most. `stacks`: in the order of the forward;
    backward frees the last one first.
    """
    padded, inputs, largest, before = 0.0, 0.0, 0.0, 0.0
    for stack in stacks:
        known = [costs[kind] for kind in stack.kinds if kind in costs]
        given = sum(cost.given for cost in known)
        kept = max((cost.kept for cost in known), default=0.0)
        before += stack.padded * given
        padded = max(padded, before + stack.padded * kept)
        inputs += stack.units * given
        largest = max(largest, stack.units * kept)
    budget = min(padded - inputs - largest + spare, available)
    found = []
    for stack in reversed(stacks):
        for layer, kind in zip(reversed(stack.layers), reversed(stack.kinds), strict=True):
            if kind not in costs:
                continue
            needed = stack.units * (costs[kind].kept - costs[kind].given)
            if needed > budget:
                return found, max(budget, 0.0)
            budget -= needed
            found.append(layer)
    return found, budget


def trains_as_it_is(adapter: Adapter) -> bool:
    """Whether the model is in train mode, its weights whole and none of its modules compiled."""
    if not adapter.core.training or in_shards(adapter.core):
        return False
    modules = adapter.root.modules()
    return not any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules)


def _stacks(adapter: Adapter, row: PackedRow, store: FeatureStore) -> list[Stack]:
    """The tower's layers, where it runs, and the decoder's."""
    decoder = set(adapter.core.get_decoder().modules())
    layers = [m for m in adapter.core.modules() if _recomputes(m)]
    stacks = []
    encoded = store.missing(row.image_ids)
    if encoded:
        sizes = [sum(x.numel() for x in image.values()) for image in row.images.distinct]
        units, padded = (sum(sizes[i] for i in ids) for ids in (encoded, row.padded_image_ids))
        tower = [layer for layer in layers if layer not in decoder]
        stacks.append(Stack(tower, units, max(units, padded)))
    own = [layer for layer in layers if layer in decoder]
    stacks.append(Stack(own, row.layout.total, max(row.layout.total, row.padded_tokens)))
    return [stack for stack in stacks if stack.layers]


def _recomputes(module: nn.Module) -> bool:
    """Whether it is a layer that is computed again in backward, and not reentrantly."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    checkpointing = getattr(module, "gradient_checkpointing", False)
    layer = isinstance(module, GradientCheckpointingLayer)
    return layer and checkpointing and not reentrant(module)


def reentrant(module: nn.Module) -> bool:
    """Whether a module that checkpoints, or its layers, may do so reentrantly."""
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return options.get("use_reentrant") is not False


def _kind(layer: nn.Module) -> Kind:
    return (
        *(type(module) for module in layer.modules()),
        *((parameter.shape, parameter.requires_grad) for parameter in layer.parameters()),
    )


class _Measured:
    """Counts the bytes that a layer's forward leaves for its backward.

    `given` are those of its first argument, `kept` those of the tensors made in it: none of a layer
    that has no backward.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.given = self.kept = 0
        self.ran = False
        self._hooks = [
            layer.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, layer, args, kwargs) -> None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.given += tensors[0].nbytes
        outside = {_storage(x) for x in (*tensors, *layer.parameters(), *layer.buffers())}
        self._seen = outside
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._count, lambda x: x)
        self._saving.__enter__()

    def _count(self, saved: Tensor) -> Tensor:
        storage = _storage(saved)
        if storage not in self._seen:
            self._seen.add(storage)
            self.kept += saved.untyped_storage().nbytes()
        return saved.detach()

    def _end(self, layer, args, output) -> None:
        self._saving.__exit__(None, None, None)
        self.ran = True
        if not any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(output)):
            self.given = self.kept = 0

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
