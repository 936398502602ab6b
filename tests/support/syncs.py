# SPDX-License-Identifier: Apache-2.0
"""Counts what a GPU would make the host wait for, with CPU tensors in the device's place.

Tensors given to `Device.put` stand for the device's, and so does all that is computed from them;
they report `cpu:0` as their device, the host's report `cpu`. Reading one (item, tolist, bool, cpu,
numpy), an op whose result's size depends on its values (nonzero, a boolean index, unique, ...) and
a copy to the host count as synchronisations; a copy of a host tensor to `cpu:0` as an upload. An
op that mixes the two fails, as it would on a GPU.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

HERE = torch.device("cpu", 0)
_aten = torch.ops.aten
_SIZED_BY_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.bincount.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.equal.default,
    _aten._local_scalar_dense.default,
    _aten.repeat_interleave.Tensor,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_COPIES = {_aten.copy_.default, _aten._to_copy.default}


class Device:
    """What lies on the device, and how often the host waited or sent something, by op."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept: an address is never used again
        self.syncs: collections.Counter[str] = collections.Counter()
        self.uploads: collections.Counter[str] = collections.Counter()

    def put(self, *tensors: Tensor) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for x in tensors:
                storage = x.untyped_storage()
                self._storages[storage._cdata] = storage

    def holds(self, x: object) -> bool:
        if not isinstance(x, Tensor):
            return False
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return x.untyped_storage()._cdata in self._storages

    def fresh(self, x: Tensor) -> Tensor:
        """A copy that lies on the host."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return x.detach().clone()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Device]:
        with _Calls(self), _Ops(self):
            yield self


class _Calls(TorchFunctionMode):
    """Python's side: copies and reads that CPU tensors answer without an op."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, device = kwargs or {}, self.device
        name = getattr(func, "__name__", str(func))
        x = args[0] if args else None
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return HERE if device.holds(x) else torch.device("cpu")
        if func is torch.Tensor.backward:
            with _Calls(device):
                return torch.autograd.backward(x, kwargs.get("gradient"))
        if name in ("cpu", "tolist", "numpy") and device.holds(x):
            device.syncs[name] += 1
            return device.fresh(x) if name == "cpu" else func(device.fresh(x))
        if func is torch.Tensor.to:
            return self._to(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == HERE:
            device.uploads[name] += 1
            device.put(result)
        return result

    def _to(self, func, args, kwargs):
        device, x = self.device, args[0]
        given = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (str, torch.device))]
        if not given:
            return func(*args, **kwargs)
        there = torch.device(given[0]) == HERE
        if there == device.holds(x):
            return func(*args, **kwargs)
        (device.uploads if there else device.syncs)["to"] += 1
        with _disable_current_modes():
            result = func(*args, **kwargs)
            result = result.clone() if result.data_ptr() == x.data_ptr() else result
        if there:
            device.put(result)
        return result


class _Ops(TorchDispatchMode):
    """The ops' side: marks what comes from the device, counts what waits for it."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, device = kwargs or {}, self.device
        own = OPDEFS.get(func.name().rsplit(".", 1)[0])
        if own is not None:  # an op in Python: look inside
            with _Calls(device), self:
                return own._init_fn(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        held = [device.holds(x) for x in tensors]
        name = func.name().removeprefix("aten::")
        if any(held):
            self._look(func, name, tensors, held, args)
        result = func(*args, **kwargs)
        if func is _aten.copy_.default and not held[0]:
            return result
        if any(held) or kwargs.get("device") == HERE:
            device.put(*(x for x in tree_leaves(result) if isinstance(x, Tensor)))
        return result

    def _look(self, func, name: str, tensors: list, held: list[bool], args) -> None:
        device = self.device
        if func in _SIZED_BY_VALUES:
            device.syncs[name] += 1
        elif func in _INDEXED:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            device.syncs[name] += len(masks)
            device.uploads[name] += any(i is not None and not device.holds(i) for i in args[1])
        elif func in _COPIES:
            if held[0] != held[-1]:
                (device.uploads if held[0] else device.syncs)[name] += 1
        else:
            strangers = [x for x, here in zip(tensors, held, strict=True) if not here and x.dim()]
            assert not strangers, f"{name} mixes tensors of the host and of the device"
