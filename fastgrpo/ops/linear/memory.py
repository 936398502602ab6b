# SPDX-License-Identifier: Apache-2.0
"""How many logits are held at once.

Letters: N rows, V vocabulary.
"""

from pathlib import Path

import torch

from fastgrpo.ops.select import constant_when_compiled

_KEPT_ON_CPU = 512 * 2**20


def chunk_rows(
    vocabulary: int, rows: int, itemsize: int, workspace_mb: float | None, device: torch.device
) -> int:
    """Rows of a chunk: what `workspace_mb` holds; by default 128 MiB but at least 512 rows, on a
    GPU 4096 rows, halved down to 512 while the chunk would take more than half of the free memory.
    Fewer rows starve the matmuls: each chunk reads and writes all of dweight.
    """
    row = max(vocabulary * itemsize, 1)
    fit = int((128.0 if workspace_mb is None else workspace_mb) * 2**20 // row)
    if workspace_mb is None:
        fit = _gpu_rows(row, device) if device.type == "cuda" else max(fit, 512)
    return max(1, min(rows, 4096, fit))


def _gpu_rows(row: int, device: torch.device) -> int:
    rows, free = 4096, free_bytes(device)
    while rows > 512 and 2 * rows * row > free:
        rows //= 2
    return rows


# Where a graph is compiled the memory is looked at once.
@constant_when_compiled
def keeps(
    rows: int, vocabulary: int, itemsize: int, workspace_mb: float | None, device: torch.device
) -> bool:
    """Whether the (N, V) exponentials are kept from forward to backward.

    They are if `workspace_mb` holds them; by default, if 512 MiB do, or on a GPU a sixteenth of its
    memory, as long as half of what is free does.
    """
    size = rows * vocabulary * itemsize
    if workspace_mb is not None:
        return size <= workspace_mb * 2**20
    if device.type != "cuda":
        return size <= _KEPT_ON_CPU
    total = torch.cuda.get_device_properties(device).total_memory
    return size <= total // 16 and 2 * size <= free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation can still get: of a GPU with what the allocator holds unused, of
    the host what Linux says (0 elsewhere)."""
    if device.type != "cuda":
        said = Path("/proc/meminfo")
        lines = said.read_text().splitlines() if said.exists() else ()
        kib = (int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
        return next(kib, 0) * 1024
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
