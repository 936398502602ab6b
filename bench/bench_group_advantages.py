# SPDX-License-Identifier: Apache-2.0
"""group_advantages: B rewards in groups of G. Bytes: rewards read once, advantages written once."""

import argparse

import torch
from common import Row, main, measure, median_ms, tensor_bytes

import fastgrpo as fg

SHAPES = {"B=512 G=8": (512, 8), "B=65536 G=16": (65536, 16), "B=16777216 G=16": (2**24, 16)}
SMALL = {"B=32 G=8": (32, 8)}


def grouped(rewards: torch.Tensor, G: int) -> torch.Tensor:
    """TRL's arithmetic: equal groups only, float32, one pass each for mean and std."""
    groups = rewards.view(-1, G)
    return ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def copy(rewards: torch.Tensor) -> torch.Tensor:
    """The same traffic and nothing else."""
    return rewards.clone()


def rows(args: argparse.Namespace) -> list[Row]:
    """Ours, TRL's arithmetic in torch, and a copy as the floor."""
    found = []
    for name, (B, G) in (SMALL if args.small else SHAPES).items():
        rewards = torch.rand(B, device=args.device)
        sizes = torch.full((B // G,), G, device=args.device)
        runs = {
            "fastgrpo": lambda r=rewards, s=sizes: fg.group_advantages(r, s),
            "torch, equal groups": lambda r=rewards, G=G: grouped(r, G),
            "copy": lambda r=rewards: copy(r),
        }
        times = median_ms(runs, args.device, args.repeats)
        exact = grouped(rewards.double(), G)
        for variant, run in runs.items():
            row = Row("group_advantages", name, variant, times[variant])
            row.bytes = tensor_bytes(rewards, rewards)
            if variant != "copy":
                row.error, row.note = float((run() - exact).abs().max()), "largest error"
            found.append(row)
    return found


def test_group_advantages(benchmark):
    rewards = torch.rand(512)
    measure(benchmark, lambda: fg.group_advantages(rewards, 8), shape="B=512 G=8")


if __name__ == "__main__":
    main(rows)
