# SPDX-License-Identifier: Apache-2.0
"""Shared-prefix attention, forward and backward: own kernel, gathered keys, flex, dense.

Letters: P prompt tokens, G completions, C tokens each, T = P + G C, H query heads, K key heads,
D head dimension. Every variant is counted the same work: 14 H D floating-point operations per
visible (query, key) pair, of which there are P (P + 1) / 2 + G (P C + C (C + 1) / 2).
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from common import Row, importable, main, measure, median_ms, peak_mib, tensor_bytes

from fastgrpo.attention.registry import BACKENDS, get_backend
from fastgrpo.packing.layout import GroupLayout
from fastgrpo.testing import relative_error

HEADS_3B, HEADS_7B = (16, 2, 128), (28, 4, 128)  # of Qwen2.5-VL
CPU_SHAPES = {"P=96 G=4 C=32 H=4 K=2 D=32": (96, 4, 32, (4, 2, 32))}
CUDA_SHAPES = {
    "3B P=1000 G=8 C=256": (1000, 8, 256, HEADS_3B),
    "7B P=1000 G=8 C=256": (1000, 8, 256, HEADS_7B),
    "3B P=300 G=8 C=1024": (300, 8, 1024, HEADS_3B),
    "7B P=3000 G=16 C=1024": (3000, 16, 1024, HEADS_7B),
}
SMALL = {"small P=17 G=2 C=5 H=2 K=1 D=16": (17, 2, 5, (2, 1, 16))}
MASK_LIMIT = 8192  # rows above which a (T, T) mask per head does not fit


def pairs(P: int, G: int, C: int) -> int:
    return P * (P + 1) // 2 + G * (P * C + C * (C + 1) // 2)


class Case:
    """Inputs of one shape; `step(attend)` runs forward and backward."""

    def __init__(self, P: int, G: int, C: int, heads: tuple[int, int, int], device: str) -> None:
        H, K, D = heads
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        g = torch.Generator(device).manual_seed(0)
        self.layout = GroupLayout([(P, [C] * G)], device=device)
        shapes = [(self.layout.total, n, D) for n in (H, K, K, H)]
        *qkv, self.dout = (torch.randn(s, generator=g, device=device).to(dtype) for s in shapes)
        self.qkv = [x.requires_grad_() for x in qkv]
        self.scale = D**-0.5

    def step(self, attend: Callable) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            out = attend(*self.qkv, self.layout, scale=self.scale)
            return [out, *torch.autograd.grad(out, self.qkv, self.dout)]

        return run

    def moved(self) -> float:
        """q, k, v and out read or written in forward; those, dout and the gradients in backward."""
        q, k, v = self.qkv
        return tensor_bytes(q, k, v, q) + tensor_bytes(q, k, v, q, q, q, k, v)

    def oracle(self) -> list[torch.Tensor]:
        """Float64 output and gradients, head by head to bound memory."""
        q, k, v = (x.detach().double().requires_grad_() for x in self.qkv)
        share = q.shape[1] // k.shape[1]
        seen = self.layout.dense_mask()
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        outs = []
        for h in range(q.shape[1]):
            s = (q[:, h] @ k[:, h // share].T * self.scale).masked_fill(~seen, float("-inf"))
            outs.append(s.softmax(-1) @ v[:, h // share])
            found = torch.autograd.grad(outs[-1], (q, k, v), self.dout[:, h].double())
            grads = [a + b for a, b in zip(grads, found, strict=True)]
        return [torch.stack(outs, 1).detach(), *grads]


def flex(layout: GroupLayout) -> Callable:
    """torch's flex_attention with the layout as a block mask, compiled for any length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    padded = -(-layout.total // 128) * 128
    pad = padded - layout.total
    group, segment, prefix = (
        torch.nn.functional.pad(x.int(), (0, pad), value=value)
        for x, value in zip(layout.token_tables(), (-1, -1, 0), strict=False)
    )

    def visible(b, h, i, j):
        same = (segment[i] == segment[j]) | (prefix[j] > 0)
        return (i >= j) & (group[i] == group[j]) & same

    mask = create_block_mask(visible, 1, None, padded, padded, device=layout.kv_index.device)
    compiled = torch.compile(flex_attention, dynamic=True)

    def attend(q, k, v, layout, *, scale):
        q, k, v = (
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad)).transpose(0, 1)[None]
            for x in (q, k, v)
        )
        out = compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)[: layout.total]

    return attend


def variants(case: Case, device: str) -> dict[str, Callable]:
    """Every backend that can serve here, and flex_attention on CUDA (its backward has no CPU)."""
    q = case.qkv[0]
    steps = {}
    for name in BACKENDS:
        if name == "dense" and case.layout.total > MASK_LIMIT:
            continue
        backend = get_backend(name)
        if backend.unavailable(q.device, q.dtype, q.shape[-1]) is None:
            steps[name] = case.step(backend.attend)
    if device == "cuda" and importable("torch.nn.attention.flex_attention"):
        steps["flex_attention"] = case.step(flex(case.layout))
    return steps


def rows(args: argparse.Namespace) -> Iterator[Row]:
    shapes = SMALL if args.small else CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    for shape, (P, G, C, heads) in shapes.items():
        case = Case(P, G, C, heads, args.device)
        steps = variants(case, args.device)
        oracle = case.oracle() if case.layout.total <= MASK_LIMIT else None
        times = median_ms(steps, args.device, args.repeats)
        for name, step in steps.items():
            errors = {}
            if oracle is not None:
                names = ("out", "dq", "dk", "dv")
                pairs_of = zip(names, step(), oracle, strict=True)
                errors = {f"{n} error": relative_error(a, b) for n, a, b in pairs_of}
            yield Row(
                op="shared_prefix_attention",
                shape=shape,
                variant=name,
                ms=times[name],
                flops=14.0 * heads[0] * heads[2] * pairs(P, G, C),
                bytes=case.moved(),
                peak_mib=peak_mib(step, args.device),
                error=max(errors.values()) if errors else None,
                note="largest relative error of out, dq, dk, dv against float64",
                extra=errors,
            )


def test_bench_kvgather_small(benchmark):
    case = Case(*SMALL["small P=17 G=2 C=5 H=2 K=1 D=16"], "cpu")
    measure(benchmark, variants(case, "cpu")["kvgather"])


if __name__ == "__main__":
    main(rows)
