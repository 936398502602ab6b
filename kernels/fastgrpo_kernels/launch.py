# SPDX-License-Identifier: Apache-2.0
"""How every Triton kernel of the package is launched."""

from typing import Any

import torch


def launch(
    kernel: Any, grid: tuple[int, ...], on: torch.Tensor, *args: Any, **options: Any
) -> None:
    """Run `kernel` over `grid` on the device of `on`; nothing at all for an empty grid.

    Triton launches on the current device, which need not be the tensors': on a machine with several
    GPUs their pointers would then be dereferenced by a device that cannot see them.
    """
    if 0 not in grid:
        with torch.cuda.device_of(on):
            kernel[grid](*args, **options)
