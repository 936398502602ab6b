# SPDX-License-Identifier: Apache-2.0
"""What this machine can do: matrix product and copy, the roofs that other figures are held against.

python bench/bench_roofs.py [--device cuda] [--save]
"""

import argparse

import torch
from common import Row, main, median_ms, tensor_bytes

SIDE = {"cpu": 2048, "cuda": 8192}


def rows(args: argparse.Namespace) -> list[Row]:
    """The two roofs, in the dtype that the fused ops multiply in on this device."""
    side = 256 if args.small else SIDE[args.device]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(4 * side * side, device=args.device)
    target = torch.empty_like(source)
    ms = median_ms(
        {"matmul": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)},
        args.device,
        args.repeats,
    )
    name = str(dtype).removeprefix("torch.")
    shape = f"{side} x {side} {name}"
    return [
        Row("roofs", shape, "matmul", ms["matmul"], 2.0 * side**3, tensor_bytes(a, b, out)),
        Row("roofs", f"{len(source)} float32", "copy", ms["copy"], 0.0, 2 * tensor_bytes(source)),
    ]


def test_roofs(benchmark) -> None:
    """pytest-benchmark entry point."""
    from common import measure

    x = torch.randn(256, 256)
    measure(benchmark, lambda: x @ x, flops=2.0 * 256**3)


if __name__ == "__main__":
    main(rows)
