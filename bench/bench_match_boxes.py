# SPDX-License-Identifier: Apache-2.0
"""match_boxes: batches of square problems with random scores; scipy and lapx as peers.

The peers are called as a reward would call them: scipy once per problem, lapx with the batch.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from common import Row, importable, main, measure, median_ms, peak_mib

import fastgrpo as fg
from fastgrpo.ops.select import why_not

SHAPES = {"512 of 20x20": (512, 20), "512 of 100x100": (512, 100), "64 of 256x256": (64, 256)}
SMALL = {"small 3 of 5x5": (3, 5)}


class Case:
    def __init__(self, B: int, n: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.scores = torch.rand(B, n, n, generator=generator, dtype=torch.float64).to(device)
        self.offsets = torch.arange(B + 1) * n * n
        self.sizes = [n] * B

    def match(self, method: str, impl: str) -> torch.Tensor:
        flat = self.scores.flatten()
        return fg.match_boxes(
            flat, self.offsets, self.sizes, self.sizes, method=method, impl=impl
        ).view(self.scores.shape[:2])

    def variants(self) -> dict[str, Callable[[], torch.Tensor]]:
        device = self.scores.device
        steps = {
            f"{method} {impl}": lambda method=method, impl=impl: self.match(method, impl)
            for method in ("optimal", "greedy", "greedy_rows")
            for impl in ("cuda", "cpp")
            if why_not("match_boxes", impl, device) is None
        }
        scores = self.scores.cpu().numpy()
        steps["optimal scipy"] = lambda: scipy_columns(scores)
        if importable("lap"):
            steps["optimal lapx"] = lambda: lapx_columns(scores)
        return steps

    def total(self, columns: torch.Tensor) -> float:
        taken = self.scores.cpu().gather(2, columns.cpu().clamp(min=0)[..., None])[..., 0]
        return (taken * (columns.cpu() >= 0)).sum().item()


def scipy_columns(scores: np.ndarray) -> torch.Tensor:
    from scipy.optimize import linear_sum_assignment

    return torch.tensor(np.stack([linear_sum_assignment(x, maximize=True)[1] for x in scores]))


def lapx_columns(scores: np.ndarray) -> torch.Tensor:
    import lap

    _, _, columns = lap.lapjvx_batch(1.0 - scores, n_threads=torch.get_num_threads())
    return torch.tensor(np.stack(columns), dtype=torch.int64)


def rows(args: argparse.Namespace) -> list[Row]:
    result = []
    for shape, sizes in (SMALL if args.small else SHAPES).items():
        case = Case(*sizes, args.device)
        steps = case.variants()
        times = median_ms(steps, args.device, args.repeats)
        best = case.total(scipy_columns(case.scores.cpu().numpy()))
        for name, step in steps.items():
            result.append(
                Row(
                    op="match_boxes",
                    shape=shape,
                    variant=name,
                    ms=times[name],
                    peak_mib=peak_mib(step, args.device),
                    error=abs(1 - case.total(step()) / best),
                    note="missing share of scipy's sum of scores",
                    extra={"times scipy": times["optimal scipy"] / times[name]},
                )
            )
    return result


def test_bench_match_boxes_small(benchmark):
    case = Case(3, 5, "cpu")
    measure(benchmark, lambda: case.match("optimal", None))


if __name__ == "__main__":
    main(rows)
