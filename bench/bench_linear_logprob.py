# SPDX-License-Identifier: Apache-2.0
"""linear_logprob: per-token log-probs with a loss outside, forward and backward, by plan.

Letters: N tokens, D hidden size, V vocabulary. Three matmuls are counted (two with a frozen head,
one without gradients), so that a fourth shows as a lower rate.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from bench_linear_grpo import CPU_SHAPES, CUDA_SHAPES, SMALL, Case
from common import Row, importable, main, matmul_flops, measure, median_ms, peak_mib

import fastgrpo as fg

MATMULS = {"forward": 1, "frozen head": 2, "trainable head": 3}


def variants(case: Case, mode: str) -> dict[str, Callable[[], object]]:
    """Every provider of one mode."""
    upstream = torch.linspace(-1.0, 1.0, len(case.targets), device=case.hidden.device)

    def run(logp: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            if mode == "forward":
                with torch.no_grad():
                    logp()
            else:
                case.backward((logp() * upstream).sum())

        return step

    head = (case.hidden, case.weight, case.targets)
    found = {"fastgrpo": run(lambda: fg.linear_logprob(*head).logp)}
    if mode == "trainable head":
        found["fastgrpo keep"] = run(lambda: fg.linear_logprob(*head, workspace_mb=1e6).logp)
    entropy = ("logp", "entropy")
    found["fastgrpo with entropy"] = run(
        lambda: fg.linear_logprob(*head, outputs=entropy, entropy_grad=False).logp
    )
    found["torch eager"] = run(
        lambda: (
            (case.hidden @ case.weight.t())
            .float()
            .log_softmax(1)
            .gather(1, case.targets[:, None])[:, 0]
        )
    )
    if importable("trl.kernels.chunked_logprob"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as TRL

        args = (case.hidden, case.weight, None, case.targets, 1.0, 32768, None, 1.0, ("log_probs",))

        def trl() -> torch.Tensor:
            out = TRL.apply(*args)
            return out[0] if isinstance(out, tuple) else out

        found["TRL kernel"] = run(trl)
    return found


@torch.no_grad()
def logp_error(case: Case) -> float:
    """Largest |logp - float64| over the first 256 rows."""
    rows = slice(0, 256)
    args = (case.hidden[rows], case.weight, case.targets[rows])
    exact = fg.linear_logprob(args[0].double(), args[1].double(), args[2], impl="torch").logp
    return float((fg.linear_logprob(*args).logp - exact).abs().max())


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Forward only, frozen and trainable head at every shape."""
    shapes = SMALL if args.small else CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    for name, sizes in shapes.items():
        for mode, matmuls in MATMULS.items():
            case = Case(*sizes, args.device, frozen=mode == "frozen head")
            runs = variants(case, mode)
            times = median_ms(runs, args.device, args.repeats)
            for variant, run in runs.items():
                row = Row("linear_logprob", f"{name} {mode}", variant, times[variant])
                row.flops = matmul_flops(*sizes, matmuls=matmuls)
                row.peak_mib = peak_mib(run, args.device)
                if variant == "fastgrpo":
                    row.error, row.note = logp_error(case), "largest log-prob error"
                yield row


def test_linear_logprob(benchmark):
    case = Case(*SMALL["small N=64 D=32 V=512"], "cpu")
    measure(benchmark, variants(case, "trainable head")["fastgrpo"], shape="small")


if __name__ == "__main__":
    main(rows)
