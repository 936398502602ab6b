# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of a mixture of experts, from packed rows.

Letters: T packed tokens, E experts, k experts a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.host import device_copies
from fastgrpo.packing.row import PackedRow


class RouterBalance:
    """Collects what the routers say of some rows; `loss()` is that of the rows unpacked.

        loss = E sum_e f_e P_e,   f_e = assignments to e / n,   P_e = summed probability of e / n

    over the n tokens of all layers (Fedus et al., arXiv 2101.03961, equations 4 to 6, as
    transformers computes it). A prompt's token is counted once for each of its completions, as if
    each completion had been run behind its own prompt. Differentiable through P. `uncounted` names
    completions, as (group, completion), whose tokens stand in for none: only their prompts count.
    """

    def __init__(self, adapter: Adapter, uncounted: Container[tuple[int, int]] = ()):
        self.routers = adapter.family.routers(adapter.core)
        if not self.routers:
            raise InputError(f"family {adapter.family.name!r} has no routers to balance")
        self.uncounted = uncounted
        self._assigned: list[Tensor] = []
        self._probability: list[Tensor] = []
        self._tokens = 0

    @contextlib.contextmanager
    def watching(self, row: PackedRow) -> Iterator[None]:
        """Around the forward of a packed row."""
        logits: list[tuple[Tensor, int]] = []

        def collect(router, inputs, output):
            # Nothing is computed here: activation checkpointing must find the same graph again.
            logits.append((output[0], router.top_k))

        hooks = [router.register_forward_hook(collect) for router in self.routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        seen = self._multiplicity(row)
        (weight,) = device_copies([torch.tensor(seen, dtype=torch.float32)], logits[0][0].device)
        for layer, top_k in logits:
            self._add(layer, top_k, weight)
        self._tokens += len(logits) * sum(seen)

    def _multiplicity(self, row: PackedRow) -> list[int]:
        """How many of the unpacked rows hold each token."""
        seen, members = [], iter(row.members)
        for prompt, completions in row.layout.lengths:
            seen += [len(completions)] * prompt
            for length in completions:
                seen += [int(next(members) not in self.uncounted)] * length
        return seen

    def _add(self, logits: Tensor, top_k: int, weight: Tensor) -> None:
        probability = logits.softmax(-1)  # (T, E)
        chosen = probability.topk(top_k, -1).indices  # (T, k)
        probability = probability.float()
        weight = weight.to(probability.dtype)
        counted = torch.zeros_like(probability).scatter_(1, chosen, 1.0).detach()
        for sums, values in ((self._assigned, counted), (self._probability, probability)):
            sums.append((weight[:, None] * values).sum(0))  # a matmul would be autocast to bfloat16

    def loss(self) -> Tensor:
        """The scalar loss over every row watched so far."""
        assigned, probability = (
            torch.stack(sums).sum(0) for sums in (self._assigned, self._probability)
        )
        return len(assigned) * (assigned * probability).sum() / self._tokens**2
