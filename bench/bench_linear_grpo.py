# SPDX-License-Identifier: Apache-2.0
"""linear_grpo_loss forward and backward: ours, its peers, and the bare matmuls as the floor.

Letters: N tokens, D hidden size, V vocabulary. 6NDV floating-point operations are counted for
every variant, so that a fourth matmul shows as a lower rate.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from common import Row, importable, main, matmul_flops, measure, median_ms, peak_mib, tensor_bytes

import fastgrpo as fg
from fastgrpo.testing import relative_error

CPU_SHAPES = {"N=2048 D=512 V=32768": (2048, 512, 32768)}
CUDA_SHAPES = {
    "Qwen2.5-VL-3B N=16384 D=2048 V=151936": (16384, 2048, 151936),
    "Qwen2.5-VL-7B N=16384 D=3584 V=152064": (16384, 3584, 152064),
}
SMALL = {"small N=64 D=32 V=512": (64, 32, 512)}
OBJECTIVE = fg.Objective(loss_type="dapo", beta=0.04, use_bias_correction_kl=False)
LENGTH = 128


class Case:
    """Inputs of one shape; `grads` reads the gradients of the last call."""

    def __init__(self, N: int, D: int, V: int, device: str, frozen: bool = False) -> None:
        g = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, device=device)

        self.hidden = (randn(N, D) / 4).to(dtype).requires_grad_()
        self.weight = (randn(V, D) / 8).to(dtype).requires_grad_(not frozen)
        self.targets = torch.randint(0, V, (N,), generator=g, device=device)
        self.length = min(LENGTH, N)
        self.seq_ids = torch.arange(N, device=device) // self.length
        self.advantages = randn(int(self.seq_ids[-1]) + 1)
        with torch.no_grad():
            logp = fg.linear_logprob(self.hidden, self.weight, self.targets).logp
        self.old = logp + 0.1 * randn(N)
        self.ref = logp + 0.2 * randn(N)

    def backward(self, loss: torch.Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        loss.backward()

    def grads(self) -> list[torch.Tensor]:
        return [x.grad for x in (self.hidden, self.weight) if x.requires_grad]

    def token_loss(self, logp: torch.Tensor) -> torch.Tensor:
        """The objective as TRL writes it, on per-token log-probs."""
        A = self.advantages[self.seq_ids]
        r = torch.exp(logp - self.old)
        loss = -torch.min(r * A, r.clamp(0.8, 1.2) * A)
        x = self.ref - logp
        return (loss + 0.04 * (torch.exp(x) - x - 1)).mean()

    def ours(self, **kwargs: object) -> None:
        result = fg.linear_grpo_loss(
            *(self.hidden, self.weight, self.targets, self.advantages, OBJECTIVE),
            **{"seq_ids": self.seq_ids, "old_logp": self.old, "ref_logp": self.ref} | kwargs,
        )
        self.backward(result.loss)

    def by_epilogue(self) -> None:
        """Ours with the exponential made in the logits' matmul (on a GPU without TMA: as ever)."""
        from fastgrpo_kernels import linear_exp

        linear_exp.EPILOGUE = True
        try:
            self.ours(impl="triton")
        finally:
            linear_exp.EPILOGUE = False

    def eager(self) -> None:
        logits = (self.hidden @ self.weight.t()).float()
        logp = logits.log_softmax(-1).gather(1, self.targets[:, None])[:, 0]
        self.backward(self.token_loss(logp))

    def trl(self) -> None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        head = (self.hidden, self.weight, None, self.targets, 1.0, 32768)
        out = ChunkedLogProbFunction.apply(*head, None, 1.0, ("log_probs",))
        self.backward(self.token_loss(out[0] if isinstance(out, tuple) else out))

    def cross_entropy(self) -> None:
        nll = torch.nn.functional.linear_cross_entropy(
            self.hidden, self.weight, self.targets, reduction="none"
        )
        self.backward(self.token_loss(-nll.float()))

    def liger(self) -> Callable[[], None]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        B, L = len(self.advantages), self.length
        loss = LigerFusedLinearGRPOLoss(
            beta=0.04, compiled=False, use_ref_model=True, loss_type="dapo"
        )

        def run() -> None:
            out, _ = loss(
                self.hidden.view(B, L, -1),
                self.weight,
                self.targets.view(B, L),
                torch.ones(B, L, device=self.hidden.device),
                self.advantages,
                ref_per_token_logps=self.ref.view(B, L),
                old_per_token_logps=self.old.view(B, L),
            )
            self.backward(out)

        return run

    def floor(self) -> Callable[[], None]:
        """The matmuls alone, into memory that is there: three, or two with a frozen head."""
        x, w = self.hidden.detach(), self.weight.detach()
        z = x.new_empty(len(x), len(w))
        dx, dw = torch.empty_like(x), torch.empty_like(w)

        def run() -> None:
            torch.mm(x, w.t(), out=z)
            torch.mm(z, w, out=dx)
            if self.weight.requires_grad:
                torch.mm(z.t(), x, out=dw)

        return run

    def oracle(self) -> list[torch.Tensor]:
        """Gradients in float64."""
        wide = Case.__new__(Case)
        vars(wide).update(vars(self))
        for name in ("hidden", "weight"):
            x = getattr(self, name)
            setattr(wide, name, x.detach().double().requires_grad_(x.requires_grad))
        result = fg.linear_grpo_loss(
            *(wide.hidden, wide.weight, wide.targets, wide.advantages.double(), OBJECTIVE),
            seq_ids=wide.seq_ids,
            old_logp=wide.old.double(),
            ref_logp=wide.ref.double(),
            impl="torch",
        )
        result.loss.backward()
        return wide.grads()


def variants(case: Case, device: str) -> dict[str, Callable[[], None]]:
    """Every provider that runs here, fastgrpo's first."""
    found: dict[str, Callable[[], None]] = {"fastgrpo": case.ours}
    for impl in ("torch", "cpp", "triton"):
        try:
            case.ours(impl=impl)
        except fg.InputError:
            continue
        found[f"fastgrpo {impl}"] = lambda impl=impl: case.ours(impl=impl)
    if device == "cuda" and "fastgrpo triton" in found:
        found["fastgrpo triton, epilogue"] = case.by_epilogue
    found["bare matmuls"] = case.floor()
    found["torch eager"] = case.eager
    if importable("trl.kernels.chunked_logprob"):
        found["TRL kernel + torch loss"] = case.trl
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        found["F.linear_cross_entropy + torch loss"] = case.cross_entropy
    if importable("liger_kernel.chunked_loss"):
        found["Liger fused linear GRPO"] = case.liger()
    return found


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Trainable head, and frozen head for ours and the floor, at every shape."""
    shapes = SMALL if args.small else CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    for name, (N, D, V) in shapes.items():
        for frozen in (False, True):
            case = Case(N, D, V, args.device, frozen)
            runs = variants(case, args.device)
            if frozen:
                runs = {k: f for k, f in runs.items() if k[:4] in ("fast", "bare", "TRL ")}
            yield from _measure(case, runs, f"{name}{' frozen head' * frozen}", args, (N, D, V))


def _measure(case: Case, runs: dict, shape: str, args: argparse.Namespace, sizes) -> list[Row]:
    times = median_ms(runs, args.device, args.repeats)
    # The float64 oracle needs 8(2NC + 2VD) bytes; it is skipped where the time is what matters.
    exact = case.oracle() if sizes[0] * sizes[2] <= 2**27 else None
    found = []
    for variant, run in runs.items():
        error = None
        if exact is not None and variant != "bare matmuls":
            run()
            error = max(relative_error(a, b) for a, b in zip(case.grads(), exact, strict=True))
        vs = {
            "x of floor": times[variant] / times["bare matmuls"],
            "ours faster by": times[variant] / times["fastgrpo"],
        }
        flops = matmul_flops(*sizes, matmuls=3 if case.weight.requires_grad else 2)
        peak = peak_mib(run, args.device)
        found.append(
            Row(
                *("linear_grpo", shape, variant, times[variant]),
                flops=flops,
                # hidden and weight read once, their gradients written once
                bytes=2 * tensor_bytes(case.hidden, case.weight),
                peak_mib=peak,
                error=error,
                note="" if error is None else "relative gradient error",
                extra=vs,
            )
        )
    return found


def test_linear_grpo(benchmark):
    case = Case(*SMALL["small N=64 D=32 V=512"], "cpu")
    measure(benchmark, case.ours, shape="small")


if __name__ == "__main__":
    main(rows)
