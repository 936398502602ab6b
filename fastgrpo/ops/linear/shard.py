# SPDX-License-Identifier: Apache-2.0
"""A weight whose vocabulary is split over a process group."""

import torch
import torch.distributed as dist


class Shard:
    """This rank's rows of a weight whose vocabulary is split over a process group."""

    def __init__(self, group_name: str, size: int) -> None:
        self.group = dist.distributed_c10d._resolve_process_group(group_name)
        ranks = dist.get_world_size(self.group)
        sizes: list[int] = [0] * ranks
        dist.all_gather_object(sizes, size, group=self.group)
        self.start = sum(sizes[: dist.get_rank(self.group)])
        self.vocabulary = sum(sizes)

    def local(self, y: torch.Tensor) -> torch.Tensor:
        """Target ids relative to this shard; outside [0, V) they lie on another."""
        return y - self.start

    def sum(self, x: torch.Tensor | None) -> torch.Tensor | None:
        if x is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def any(self, flags: torch.Tensor) -> torch.Tensor:
        return self.max(flags.to(torch.int32)).bool()
