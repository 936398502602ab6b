# SPDX-License-Identifier: Apache-2.0
"""The prompts of a rollout, forwarded with their graph, as the first part of the loss's forward.

While the weights are those that sampled, the loss needs of a prompt what the rollout computed: its
keys and values in every layer and the hidden state that predicts the first token. A row whose
prompts are kept runs its completions alone, and backward goes through both forwards.

Letters: N completion tokens of a row of T, U distinct rows that predict one, P tokens of a prompt,
H query heads, K key heads, D their size, or that of a hidden state.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo.attention.registry import get_backend
from fastgrpo.engine.activations import reentrant, trains_as_it_is
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.group import Group, are_pixels
from fastgrpo.packing.host import device_copies, first_equal
from fastgrpo.packing.layout import GroupLayout
from fastgrpo.packing.row import PackedRow

Layers = dict[nn.Module, tuple[Tensor, Tensor]]  # each layer's keys and values (P, K, D)


class KeptPrompt(NamedTuple):
    """A prompt with its images; `last` (D,) is the hidden state that predicts the first token."""

    group: Group
    layers: Layers
    last: Tensor


class KeptPrompts:
    """What the rollout computed of its prompts, good until a weight changes.

    For a loss of all of them: it differentiates their graph, which is then gone.
    `keep_activations`: see `engine.activations`.
    """

    def __init__(self, adapter: Adapter, *, keep_activations: bool = False):
        self.keep_activations = keep_activations
        self._device = adapter.device
        self._weights = [(p, p._version) for p in adapter.core.parameters()]
        self._prompts: list[KeptPrompt] = []
        self.spare = 0.0  # bytes of activations that their forwards have left

    @staticmethod
    def serves(adapter: Adapter) -> bool:
        """Whether the model's forward leaves all that a completion needs of its prompt in keys and
        values, with their graph: reentrant checkpointing makes them without, recurrent layers have
        states beside them, and shards are another engine's to gather."""
        if adapter.mixers or not trains_as_it_is(adapter):
            return False
        modules = adapter.core.modules()
        return not any(reentrant(m) for m in modules if getattr(m, "gradient_checkpointing", False))

    def put(self, group: Group, layers: Layers, last: Tensor) -> None:
        """A prompt's part of a forward with gradient, see `KeptPrompt`."""
        # pixels where the loss's are
        vision = {k: x.to(self._device) if are_pixels(x) else x for k, x in group.vision.items()}
        group = Group(group.prompt_ids.cpu(), [], vision)
        self._prompts.append(KeptPrompt(group, layers, last))

    def continued(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """The rows, without their prompts where all of them are here.

        With gradient enabled these are the rows that differentiate them.
        """
        if any(p._version != version for p, version in self._weights):
            self._prompts = []
        if not self._prompts:
            return list(rows)
        parts = [part for row in rows for part in row.parts]
        groups = [*(prompt.group for prompt in self._prompts), *(part.group for part in parts)]
        images = first_equal([group.vision for group in groups])
        keys = [(g.prompt_ids.numpy().tobytes(), i) for g, i in zip(groups, images, strict=True)]
        kept = dict(zip(keys, self._prompts, strict=False))
        wanted = iter(keys[len(self._prompts) :])
        found, spare = [], self.spare
        for row in rows:
            prompts = [kept.get(next(wanted)) for _ in row.parts]
            if None not in prompts and not _shows_images(row):
                row, spare = ContinuedRow(row, prompts, spare), 0.0
            found.append(row)
        if torch.is_grad_enabled():
            self._prompts = []
        return found


def _shows_images(row: PackedRow) -> bool:
    """Whether a completion has images of its own."""
    return any(row.groups[g].vision_of(c) for g, c in row.members)


class ContinuedRow(PackedRow):
    """A packed row of completions alone, behind prompts that were forwarded before."""

    def __init__(self, row: PackedRow, prompts: Sequence[KeptPrompt], spare: float):
        vars(self).update(vars(row))
        before = row.layout
        self.layout = Continuation(before, prompts)
        own = self.layout.own
        self.inputs = row.inputs | {
            "input_ids": row.inputs["input_ids"][..., own],
            "position_ids": row.inputs["position_ids"][..., own],
            "fg_layout": self.layout,
            "logits_to_keep": torch.arange(self.layout.total, device=own.device),
        }
        # the prompts' forward has had the rest
        self.spare = spare
        self.image_ids, self.padded_image_ids = [], []
        self.padded_tokens -= sum(prompt * len(lengths) for prompt, lengths in before.lengths)

    def predicting(self, hidden: Tensor) -> Tensor:
        return self.layout.with_prompts(hidden)


class Continuation:
    """Stands in for a GroupLayout where the row has no prompts: `own` are its tokens there."""

    def __init__(self, layout: GroupLayout, prompts: Sequence[KeptPrompt]):
        self.layout = copy.copy(layout)
        self.layout.cache, self.layout.continued = {}, True
        self.predictors = layout.predictors
        self.sizes = [sum(lengths) for _, lengths in layout.lengths]
        self.total = sum(self.sizes)
        spans = [(start, end) for start, end, prefix, stop in layout.segments if stop > prefix]
        own = torch.cat([torch.arange(start, end) for start, end in spans])
        place = torch.zeros(layout.total, dtype=torch.int64)
        place[own] = torch.arange(self.total)
        ends = [end for _, end, prefix, stop in layout.segments if stop == prefix]
        place[torch.tensor(ends) - 1] = torch.arange(self.total, self.total + len(prompts))
        self.own, place = device_copies([own, place], layout.keep_rows.device)
        self._where = place[layout.keep_rows]
        self._lasts = torch.stack([prompt.last for prompt in prompts])
        self._layers = {
            module: [[prompt.layers[module][i] for prompt in prompts] for i in (0, 1)]
            for module in prompts[0].layers
        }

    def with_prompts(self, hidden: Tensor) -> Tensor:
        """(U, D) hidden states that predict a token, from those of the completions (N, D)."""
        return torch.cat([hidden, self._lasts]).index_select(0, self._where)

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, layout, **options):
        """(N, H, D) of the completions' queries over the prompts' keys and their own."""
        keys, values = self._layers[module]
        unasked = [query.new_zeros(len(prompt), *query.shape[1:]) for prompt in keys]
        whole = [self._whole(*x) for x in ((unasked, query), (keys, key), (values, value))]
        out = get_backend(self.layout.backend).attend(*whole, self.layout, **options)
        return out.index_select(0, self.own)

    def _whole(self, prompts: list[Tensor], own: Tensor) -> Tensor:
        """(T, H, D): each prompt, then its completions."""
        pairs = zip(prompts, own.split(self.sizes), strict=True)
        return torch.cat([x for pair in pairs for x in pair])
