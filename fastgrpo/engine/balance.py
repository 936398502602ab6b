# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of a mixture of experts, from packed rows.

Letters: T packed tokens, E experts, k experts a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter


class RouterBalance:
    """Collects what the routers say of some rows; `loss()` is that of the rows unpacked.

        loss = E sum_e f_e P_e,   f_e = assignments to e / n,   P_e = summed probability of e / n

    over the n tokens of all layers (Fedus et al., arXiv 2101.03961, equations 4 to 6, as
    transformers computes it). A prompt's token is counted once for each of its completions, as if
    each completion had been run behind its own prompt. Differentiable through P.
    """

    def __init__(self, adapter: Adapter):
        self.routers = adapter.family.routers(adapter.core)
        if not self.routers:
            raise InputError(f"family {adapter.family.name!r} has no routers to balance")
        self._assigned: list[Tensor] = []
        self._probability: list[Tensor] = []
        self._tokens = 0

    @contextlib.contextmanager
    def watching(self, layout) -> Iterator[None]:
        """Around the forward of a packed row."""
        seen = []
        for prompt, completions in layout.lengths:
            seen += [len(completions)] * prompt + [1] * sum(completions)
        weight = torch.tensor(seen, dtype=torch.float32, device=layout.kv_index.device)

        def collect(router, inputs, output):
            probability = output[0].softmax(-1)  # (T, E)
            chosen = probability.topk(router.top_k, -1).indices  # (T, k)
            probability = probability.float()
            counted = torch.zeros_like(probability).scatter_(1, chosen, 1.0).detach()
            self._assigned.append(weight.to(probability.dtype) @ counted)
            self._probability.append(weight.to(probability.dtype) @ probability)
            self._tokens += sum(seen)

        hooks = [router.register_forward_hook(collect) for router in self.routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self) -> Tensor:
        """The scalar loss over every row watched so far."""
        assigned, probability = (
            torch.stack(sums).sum(0) for sums in (self._assigned, self._probability)
        )
        return len(assigned) * (assigned @ probability) / self._tokens**2
