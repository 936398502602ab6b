# SPDX-License-Identifier: Apache-2.0
"""pairwise_box_iou: own kernels, plain PyTorch, torchvision where it imports.

Bytes: every box read once, every value written once. Batches of B samples with n x m boxes.
"""

import argparse
from collections.abc import Callable

import torch
from common import Row, importable, main, measure, median_ms, peak_mib

import fastgrpo as fg
from fastgrpo.ops.select import why_not

# B, n, m: 512 completions of a detection task; on a GPU also enough to fill the chip.
CPU_SHAPES = {"B=512 50x50": (512, 50, 50)}
CUDA_SHAPES = {"B=512 50x50": (512, 50, 50), "B=4096 128x128": (4096, 128, 128)}
SMALL = {"small B=3 5x4": (3, 5, 4)}


class Case:
    def __init__(self, B: int, n: int, m: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def boxes(count: int) -> torch.Tensor:
            corner, size = torch.rand(2, count, 2, generator=generator, dtype=torch.float64) * 500
            return torch.cat([corner, corner + size], 1).to(device, dtype)

        self.a, self.b = boxes(B * n), boxes(B * m)
        self.sizes = [n] * B, [m] * B
        self.bytes = float((4 * B * (n + m) + B * n * m) * self.a.element_size())

    def variants(self, kind: str) -> dict[str, Callable[[], torch.Tensor]]:
        def run(impl: str) -> Callable[[], torch.Tensor]:
            return lambda: fg.pairwise_box_iou(self.a, self.b, *self.sizes, kind=kind, impl=impl)[0]

        device = self.a.device
        steps = {
            impl: run(impl)
            for impl in ("triton", "cpp", "reference")
            if why_not("pairwise_box_iou", impl, device) is None
        }
        if importable("torchvision"):
            from torchvision.ops import boxes as peer

            names = {"iou": "box_iou", "giou": "generalized_box_iou"}
            names |= {"diou": "distance_box_iou", "ciou": "complete_box_iou"}
            op = getattr(peer, names[kind])
            pairs = list(zip(self.a.split(self.sizes[0]), self.b.split(self.sizes[1]), strict=True))
            steps["torchvision"] = lambda: torch.cat([op(x, y).flatten() for x, y in pairs])
        return steps

    def oracle(self, kind: str) -> torch.Tensor:
        a, b = self.a.double(), self.b.double()
        return fg.pairwise_box_iou(a, b, *self.sizes, kind=kind, impl="reference")[0]


def rows(args: argparse.Namespace) -> list[Row]:
    shapes = SMALL if args.small else CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    result = []
    for shape, sizes in shapes.items():
        for dtype in (torch.float32, torch.float64):
            case = Case(*sizes, dtype, args.device)
            for kind in ("iou", "giou", "ciou"):
                steps, oracle = case.variants(kind), case.oracle(kind)
                times = median_ms(steps, args.device, args.repeats)
                for name, step in steps.items():
                    result.append(
                        Row(
                            op="pairwise_box_iou",
                            shape=f"{shape} {kind} {str(dtype).removeprefix('torch.')}",
                            variant=name,
                            ms=times[name],
                            bytes=case.bytes,
                            peak_mib=peak_mib(step, args.device),
                            error=(step().double() - oracle).abs().max().item(),
                            note="largest error against float64",
                        )
                    )
    return result


def test_bench_box_iou_small(benchmark):
    case = Case(3, 5, 4, torch.float32, "cpu")
    measure(benchmark, lambda: fg.pairwise_box_iou(case.a, case.b, *case.sizes))


if __name__ == "__main__":
    main(rows)
