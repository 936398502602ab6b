# SPDX-License-Identifier: Apache-2.0
"""linear_kl: full-vocabulary KL of two hidden streams, forward and backward.

Letters: N tokens, D hidden size, V vocabulary. Six matmuls are counted: two forward,
four gradients.
"""

import argparse

import torch
from common import Row, main, matmul_flops, measure, median_ms, peak_mib

import fastgrpo as fg
from fastgrpo.testing import relative_error

CPU_SHAPES = {"N=512 D=512 V=32768": (512, 512, 32768)}
CUDA_SHAPES = {"N=16384 D=2048 V=151936": (16384, 2048, 151936)}
SMALL = {"N=32 D=16 V=256": (32, 16, 256)}


class Case:
    """Two hidden streams and their heads."""

    def __init__(self, N: int, D: int, V: int, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        shapes = ((N, D), (V, D), (N, D), (V, D))
        self.inputs = [
            (torch.randn(*s, generator=g, device=device) * c).to(dtype).requires_grad_()
            for s, c in zip(shapes, (0.25, 0.125) * 2, strict=True)
        ]

    def ours(self, impl: str | None = None) -> list[torch.Tensor]:
        kl = fg.linear_kl(*self.inputs, impl=impl)
        return [kl, *torch.autograd.grad(kl.sum(), self.inputs)]

    def eager(self) -> list[torch.Tensor]:
        h_p, w_p, h_q, w_q = self.inputs
        log_p, log_q = ((h @ w.t()).float().log_softmax(1) for h, w in ((h_p, w_p), (h_q, w_q)))
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        return [kl, *torch.autograd.grad(kl.sum(), self.inputs)]


def rows(args: argparse.Namespace) -> list[Row]:
    """Ours and eager PyTorch, with the KL's error on the first 64 rows beside the time."""
    shapes = SMALL if args.small else CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    found = []
    for name, sizes in shapes.items():
        case = Case(*sizes, args.device)
        runs = {"fastgrpo": case.ours}
        if sizes[0] * sizes[2] * 40 < 60e9:  # ten (N, V) float32 tensors at once
            runs["torch eager"] = case.eager
        times = median_ms(runs, args.device, args.repeats)
        h_p, w_p, h_q, w_q = (x.detach() for x in case.inputs)
        few = [x.double() for x in (h_p[:64], w_p, h_q[:64], w_q)]
        exact = fg.linear_kl(*few, impl="torch")
        for variant, run in runs.items():
            row = Row("linear_kl", name, variant, times[variant], note="relative error of the KL")
            row.flops = matmul_flops(*sizes, matmuls=6)
            row.error = relative_error(run()[0][:64].detach(), exact)
            row.peak_mib = peak_mib(run, args.device)
            found.append(row)
    return found


def test_linear_kl(benchmark):
    measure(benchmark, Case(*SMALL["N=32 D=16 V=256"], "cpu").ours, shape="small")


if __name__ == "__main__":
    main(rows)
