# SPDX-License-Identifier: Apache-2.0
"""Many small tensors between host and device: one transfer, whatever their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_ALIGN = 16  # bytes between the starts of two tensors in a buffer: any dtype can be viewed there
_compared = WeakTensorKeyDictionary()  # of a tensor that nobody writes to: parts, and if they agree


def on_host(x: Tensor) -> bool:
    """Whether reading `x` waits for no device."""
    return x.device.type == "cpu"


def host_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the host; all that lie on a device come in one copy (per device)."""
    copies = list(tensors)
    devices = {x.device for x in tensors if not on_host(x)}
    for device in devices:
        away = [i for i, x in enumerate(tensors) if x.device == device and not on_host(x)]
        chosen = [tensors[i].detach() for i in away]
        buffer = torch.cat([piece for x in chosen for piece in _padded(x)]).cpu()
        for i, copy in zip(away, _views(buffer, chosen), strict=True):
            copies[i] = copy
    return copies


def device_copies(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The host's tensors on `device`: one buffer, pinned for a GPU, copied without waiting."""
    device = torch.device(device)
    size = sum(_room(x) for x in tensors)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for view, x in zip(_views(buffer, tensors), tensors, strict=True):
        view.copy_(x)
    return list(_views(buffer.to(device, non_blocking=True), tensors))


def first_equal(items: Sequence[Mapping[str, Tensor]]) -> list[int]:
    """For each item the index of the first that equals it in names, dtypes, shapes and elements.

    On the host, items that equal the one before them, as a group's do, are found by that comparison
    alone. For the others some elements, on a device checksums, find candidates and comparisons
    decide; a device is read once for each.
    """
    first = list(range(len(items)))
    for i in range(1, len(items)):
        if _equal_on_host(items[i - 1], items[i]):
            first[i] = first[i - 1]
    chosen = sorted(set(first))
    among = _first_among([items[i] for i in chosen])
    where = {i: chosen[c] for i, c in zip(chosen, among, strict=True)}
    return [where[i] for i in first]


def _equal_on_host(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two items hold the same and lie on the host."""
    return a.keys() == b.keys() and all(
        on_host(x)
        and on_host(b[name])
        and x.dtype == b[name].dtype
        and (_same_memory(x, b[name]) or _same_contents(x, b[name]))
        for name, x in a.items()
    )


def nobody_writes_to(x: Tensor) -> None:
    """`first_equal` will compare two parts of this tensor of the host once."""
    _compared[x] = {}


def _same_contents(x: Tensor, other: Tensor) -> bool:
    known = _compared.get(x._base) if x._base is not None and x._base is other._base else None
    if known is None:
        return torch.equal(x, other)
    key = tuple((part.storage_offset(), part.shape, part.stride()) for part in (x, other))
    if key not in known:
        known[key] = torch.equal(x, other)
    return known[key]


def _first_among(items: Sequence[Mapping[str, Tensor]]) -> list[int]:
    named = [sorted(item.items()) for item in items]
    away = [x for item in named for _, x in item if not on_host(x)]
    sums = host_copies([x.sum(dtype=torch.float64) for x in away])
    sums = iter(torch.stack(sums).tolist() if sums else ())
    keys = [
        tuple(
            (name, x.dtype, tuple(x.shape), _some_bytes(x) if on_host(x) else next(sums))
            for name, x in item
        )
        for item in named
    ]
    seen: dict[tuple, int] = {}
    candidates = [seen.setdefault(key, i) for i, key in enumerate(keys)]
    pairs = [(i, c) for i, c in enumerate(candidates) if i != c]
    first = list(range(len(items)))
    for (i, c), same in zip(pairs, _equal(items, pairs), strict=True):
        if same:
            first[i] = c
            continue
        # candidates of different contents: rare enough to be looked at one by one
        others = (j for j in range(c + 1, i) if keys[j] == keys[i] and first[j] == j)
        first[i] = next((j for j in others if _equal(items, [(i, j)])[0]), i)
    return first


def _equal(items: Sequence[Mapping[str, Tensor]], pairs: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether the two items of each pair, whose shapes agree, hold the same."""
    equal, flags = [True] * len(pairs), []
    for nth, (i, j) in enumerate(pairs):
        for name, x in items[i].items():
            other = items[j][name]
            if _same_memory(x, other):
                continue
            if on_host(x):
                equal[nth] &= torch.equal(x, other)
            else:
                flags.append((nth, (x == other).all()))
    for (nth, _), same in zip(flags, host_copies([flag for _, flag in flags]), strict=True):
        equal[nth] &= bool(same)
    return equal


def _some_bytes(x: Tensor) -> bytes:
    """Up to 64 elements from all over a tensor of the host."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 64)][:64].contiguous().view(torch.uint8).numpy().tobytes()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return a is b or (same and a.numel() > 0)


def _room(x: Tensor) -> int:
    return -(-x.numel() * x.itemsize // _ALIGN) * _ALIGN


def _padded(x: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor, and as many as bring the next to its place."""
    data = x.contiguous().reshape(-1).view(torch.uint8)
    yield data
    yield data.new_zeros(_room(x) - data.numel())


def _views(buffer: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    start = 0
    for x in like:
        yield buffer[start : start + x.numel() * x.itemsize].view(x.dtype).view(x.shape)
        start += _room(x)
