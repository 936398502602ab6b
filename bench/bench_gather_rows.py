# SPDX-License-Identifier: Apache-2.0
"""gather_rows forward and backward: own kernels, the torch path, PyTorch's indexing.

Letters: N rows, M index entries, D columns. Bytes: forward reads and writes M D, backward reads
M D and writes N D; no floating-point work worth counting.
"""

import argparse
from collections.abc import Callable

import torch
from common import Row, main, measure, median_ms, peak_mib

from fastgrpo.ops.gather_rows import gather_rows, row_index
from fastgrpo.ops.select import why_not
from fastgrpo.packing.layout import GroupLayout
from fastgrpo.testing import relative_error

# prompt, completions, their length, columns (keys of Qwen2.5-VL-7B: 4 heads of 128)
CPU_SHAPES = {"P=500 G=8 C=64 D=512": (500, 8, 64, 512)}
CUDA_SHAPES = {
    "KV of 7B, P=1000 G=8 C=256": (1000, 8, 256, 512),
    "KV of 7B, P=3000 G=16 C=1024": (3000, 16, 1024, 512),
}
SMALL = {"small P=7 G=2 C=3 D=8": (7, 2, 3, 8)}


class Case:
    def __init__(self, P: int, G: int, C: int, D: int, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        g = torch.Generator(device).manual_seed(0)
        layout = GroupLayout([(P, [C] * G)], device=device)
        self.index = row_index(layout.kv_index, layout.total)
        N, M = layout.total, len(layout.kv_index)
        self.x = torch.randn(N, D, generator=g, device=device).to(dtype).requires_grad_()
        self.dout = torch.randn(M, D, generator=g, device=device).to(dtype)
        self.bytes = float((3 * M + N) * D * self.x.element_size())

    def variants(self) -> dict[str, Callable[[], torch.Tensor]]:
        def step(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
            return lambda: torch.autograd.grad(f(self.x), self.x, self.dout)[0]

        steps = {
            name: step(lambda x, name=name: gather_rows(x, self.index, impl=name))
            for name in ("triton", "torch", "reference")
            if why_not("gather_rows", name, self.x.device) is None
        }
        steps["x.index_select"] = step(lambda x: x.index_select(0, self.index.index))
        steps["x[index]"] = step(lambda x: x[self.index.index])
        return steps

    def oracle(self) -> torch.Tensor:
        dx = torch.zeros_like(self.x, dtype=torch.float64)
        return dx.index_add_(0, self.index.index, self.dout.double())


def rows(args: argparse.Namespace) -> list[Row]:
    shapes = SMALL if args.small else CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    result = []
    for shape, sizes in shapes.items():
        case = Case(*sizes, args.device)
        steps = case.variants()
        times = median_ms(steps, args.device, args.repeats)
        oracle = case.oracle()
        for name, step in steps.items():
            result.append(
                Row(
                    op="gather_rows",
                    shape=shape,
                    variant=name,
                    ms=times[name],
                    bytes=case.bytes,
                    peak_mib=peak_mib(step, args.device),
                    error=relative_error(step(), oracle),
                    note="relative error of the gradient against float64",
                )
            )
    return result


def test_bench_gather_rows_small(benchmark):
    case = Case(*SMALL["small P=7 G=2 C=3 D=8"], "cpu")
    measure(benchmark, case.variants()["torch"])


if __name__ == "__main__":
    main(rows)
