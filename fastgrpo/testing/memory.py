# SPDX-License-Identifier: Apache-2.0
"""What a process holds."""

from __future__ import annotations

import gc
from pathlib import Path

import torch


def held_bytes() -> int:
    """Bytes of all storages of tensors: weights or shards, gradients, optimizer, the batch."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes(field: str = "VmRSS") -> int:
    """A size in /proc/self/status: VmRSS now, VmHWM the most there was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field + ":")) * 1024


class StepMemory:
    """What a process holds between steps, and the most it had, in MiB.

    On the CPU the peak is of the resident set, above its size at the start.
    """

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        if not self.cuda:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
            self.start = resident_bytes()

    def figures(self) -> dict[str, float]:
        held = held_bytes() / 2**20
        if self.cuda:
            return {"held MiB": held, "peak MiB": torch.cuda.max_memory_allocated() / 2**20}
        return {"held MiB": held, "peak MiB": (resident_bytes("VmHWM") - self.start) / 2**20}
