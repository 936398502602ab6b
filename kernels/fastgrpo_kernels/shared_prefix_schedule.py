# SPDX-License-Identifier: Apache-2.0
"""Tiles, warps and stages with which the shared-prefix attention kernels are launched."""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Launch configuration of one kernel."""

    m: int  # query rows
    n: int  # keys
    warps: int
    stages: int
    registers: int | None = None  # a thread's limit; None: ptxas weighs them against occupancy


# Chosen without a GPU: the largest tiles that compile without spilling a register by triton 3.6 and
# 3.9, with two stages of loads where shared memory and registers allow. Columns: head dimension up
# to 64, below 128 (padded to it), 128, above. sm_80's rows also fit the 99 KiB of shared memory of
# consumer cards. `fastgrpo doctor --compile` prints registers and spills. Those of sm_90 at 128 are
# what bench/occupancy.py finds best, two programs of dkv and of fwd to a multiprocessor. The
# limit of registers: under triton 3.6 ptxas spills for a third program, for which shared memory has
# no room.
TILES = {  # (m, n, warps, stages[, registers])
    "fwd sm_80": ((128, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "fwd sm_90": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2)),
    "fwd sm_100": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "dq sm_80": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    "dq sm_90": ((128, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "dq sm_100": ((64, 64, 8, 2), (64, 64, 8, 2, 128), (128, 64, 8, 2), (64, 32, 8, 2)),
    "dkv sm_80": ((64, 32, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    "dkv sm_90": ((64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 1), (32, 32, 8, 2)),
    "dkv sm_100": ((64, 64, 8, 2), (32, 64, 4, 1), (64, 64, 8, 1), (32, 32, 8, 2)),
}
# float32 multiplies by three TF32 products on the tensor cores, which takes more registers.
TILES_FP32 = {"fwd": Tiles(32, 32, 4, 1), "dq": Tiles(32, 16, 8, 1), "dkv": Tiles(16, 16, 8, 1)}
TILES_FP32_WIDE = Tiles(16, 16, 8, 1)
INTERPRETED = Tiles(32, 16, 4, 1)  # unequal, so that mixed-up tile sizes show in the tests


def tiles(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, plain: bool
) -> Tiles:
    """The configuration of `kernel` ("fwd", "dq", "dkv"), fixed by the inputs' kind, not size.

    plain: neither a sliding window nor a softcap.
    """
    if device.type != "cuda":
        return INTERPRETED
    major = torch.cuda.get_device_capability(device)[0]
    arch = {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")
    return compiled_tiles(kernel, arch, dtype == torch.float32, head_dim, plain)


def compiled_tiles(kernel: str, arch: str, fp32: bool, head_dim: int, plain: bool) -> Tiles:
    if fp32:
        return TILES_FP32[kernel] if head_dim <= 128 else TILES_FP32_WIDE
    column = (head_dim > 64) + (head_dim >= 128) + (head_dim > 128)
    t = Tiles(*TILES[f"{kernel} {arch}"][column])
    if kernel == "dkv" and not plain:  # their registers are taken from the keys
        return t._replace(n=min(t.n, 64), warps=8)
    return t
