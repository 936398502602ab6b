# SPDX-License-Identifier: Apache-2.0
"""grpo_loss on given log-probs, forward and backward. N tokens in B sequences of L.

Bytes: log-probs, old, reference, ids, mask and advantages read once, the gradient written once.
"""

import argparse

import torch
from common import Row, main, measure, median_ms, peak_mib, tensor_bytes

import fastgrpo as fg

SHAPES = {"B=64 L=256": (64, 256), "B=512 L=1024": (512, 1024), "B=64 L=16384": (64, 16384)}
SMALL = {"B=4 L=16": (4, 16)}
OBJECTIVES = {
    "dapo": fg.Objective("dapo", beta=0.04),
    "gspo": fg.Objective("grpo", "sequence", beta=0.04),
    "vespo": fg.Objective("vespo"),
}


class Case:
    """Packed log-probs of B sequences of L tokens."""

    def __init__(self, B: int, L: int, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.shape = (B, L)
        self.logp = (-torch.rand(B * L, generator=g, device=device)).requires_grad_()
        noise = torch.randn(2, B * L, generator=g, device=device)
        self.old = self.logp.detach() + 0.1 * noise[0]
        self.ref = self.logp.detach() + 0.2 * noise[1]
        self.advantages = torch.randn(B, generator=g, device=device)
        self.seq_ids = torch.arange(B, device=device).repeat_interleave(L)
        self.mask = torch.ones(B * L, dtype=torch.bool, device=device)

    def ours(self, obj: fg.Objective, impl: str | None = None) -> torch.Tensor:
        loss = fg.grpo_loss(
            *(self.logp, self.advantages, obj),
            seq_ids=self.seq_ids,
            mask=self.mask,
            old_logp=self.old,
            ref_logp=self.ref,
            impl=impl,
        ).loss
        return torch.autograd.grad(loss, self.logp)[0]

    def padded(self) -> torch.Tensor:
        """dapo with a KL as TRL writes it on (B, L), without its metrics."""
        logp, old, ref = (x.view(self.shape) for x in (self.logp, self.old, self.ref))
        mask, A = self.mask.view(self.shape).float(), self.advantages[:, None]
        r = torch.exp(logp - old)
        loss = -torch.min(r * A, r.clamp(0.8, 1.2) * A)
        kl = (torch.exp(ref - logp) - (ref - logp) - 1) * r
        loss = ((loss + 0.04 * kl) * mask).sum() / mask.sum()
        return torch.autograd.grad(loss, self.logp)[0]


def rows(args: argparse.Namespace) -> list[Row]:
    """Each objective in each implementation that runs here; the padded form of dapo as the peer."""
    found = []
    for name, sizes in (SMALL if args.small else SHAPES).items():
        case = Case(*sizes, args.device)
        read = (case.logp, case.old, case.ref, case.seq_ids, case.mask, case.advantages, case.logp)
        for label, obj in OBJECTIVES.items():
            runs = {"fastgrpo": lambda obj=obj, case=case: case.ours(obj)}
            runs["fastgrpo reference"] = lambda obj=obj, case=case: case.ours(obj, "reference")
            if label == "dapo":
                runs["torch, padded, no metrics"] = case.padded
            times = median_ms(runs, args.device, args.repeats)
            for variant, run in runs.items():
                row = Row("grpo_loss", f"{name} {label}", variant, times[variant])
                row.bytes, row.peak_mib = tensor_bytes(*read), peak_mib(run, args.device)
                found.append(row)
    return found


def test_grpo_loss(benchmark):
    case = Case(*SMALL["B=4 L=16"], "cpu")
    measure(benchmark, lambda: case.ours(OBJECTIVES["dapo"]), shape="small")


if __name__ == "__main__":
    main(rows)
