# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a rollout: each prompt's once for its G completions, then each row's own.

Letters: P prompts, G completions per prompt, B = P G rows (prompt after prompt), L the longest
prompt, H query heads, K key heads, D head size, R = H / K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.attention.prefix_cpu import flash_cpu
from fastgrpo.attention.registry import get_backend
from fastgrpo.rollout.recurrent import ForksStates, RecordsStates, States


class Prefill(RecordsStates):
    """Stands in for a GroupLayout of prompts alone and keeps every layer's keys and values, and
    the final states of recurrent layers."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.total = layout, layout.total
        self.layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None):
        """The backend's attention over the prompts; called by the layers in order."""
        self.layers.append((key, value))
        attend = get_backend(self.layout.backend).attend
        return attend(query, key, value, self.layout, scale=scale, window=window)


class DecodeState(ForksStates):
    """One step of all rows: a packed row of B tokens, each the next of its own completion.

    `prefixes` holds, prompt after prompt, each layer's (P_i, K, D) keys and values, `states` what
    its recurrent layers left. Every step reads a prompt's keys once for its G rows. Steps have the
    same shapes but for the number of tokens decoded so far.
    """

    def __init__(
        self,
        prefixes: list[list[tuple[Tensor, Tensor]]],
        states: list[States],
        group_size: int,
        steps: int,
    ):
        super().__init__(states, group_size)
        lengths = torch.tensor([layers[0][0].shape[0] for layers in prefixes])
        self.ragged = bool((lengths != lengths[0]).any())
        self.group_size, self.total = group_size, len(prefixes) * group_size
        self.steps_done, self.calls = 0, 0
        self.prefix = [
            tuple(_padded([layers[n][i] for layers in prefixes]) for i in (0, 1))
            for n in range(len(prefixes[0]))
        ]
        sample = self.prefix[0][0]
        self.lengths = lengths.to(sample.device)
        column = torch.arange(sample.shape[2], device=sample.device)
        self.column, self.padding = column, column >= self.lengths[:, None]  # (P, L)
        seen = torch.zeros_like(self.padding, dtype=sample.dtype)
        added = seen.masked_fill_(self.padding, float("-inf"))[:, None, None]
        self.added_mask = added if self.ragged else None
        self.own = [
            tuple(x.new_empty(self.total, x.shape[1], steps, x.shape[3]) for x in layer)
            for layer in self.prefix
        ]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None):
        """(B, H, D) of this step's queries over prompt and own keys, this step's included."""
        layer, t = self.calls % len(self.prefix), self.steps_done
        self.calls += 1
        own_key, own_value = self.own[layer]
        own_key[:, :, t], own_value[:, :, t] = key, value
        prefix_key, prefix_value = self.prefix[layer]
        dtypes = {x.dtype for x in (query, prefix_key, prefix_value)}  # autocast mixes them
        if window is None and query.device.type == "cpu" and dtypes == {torch.float32}:
            return self._flash(query, layer, scale)
        own = slice(self._first(window), t + 1)
        q = (query * scale).unflatten(1, (prefix_key.shape[1], -1))  # (B, K, R, D)
        far = self._of_prompts(q) @ prefix_key.transpose(2, 3)  # (P, K, G R, L)
        if (hidden := self._hidden(window)) is not None:
            far.masked_fill_(hidden[:, None, None], float("-inf"))
        near = q @ own_key[:, :, own].transpose(2, 3)  # (B, K, R, t + 1)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        far, near = far.to(wide), near.to(wide)
        # One softmax over both parts: about their common maximum, which own keys keep finite.
        top = torch.maximum(self._of_prompts(near.amax(-1, True)), far.amax(-1, True))
        far.sub_(top).exp_()
        near.sub_(self._of_rows(top)).exp_()
        total = near.sum(-1, True) + self._of_rows(far.sum(-1, True))
        out = self._of_rows(far.to(query.dtype) @ prefix_value)
        out += near.to(query.dtype) @ own_value[:, :, own]
        return (out / total).to(query.dtype).flatten(1, 2)

    def _flash(self, query: Tensor, layer: int, scale: float) -> Tensor:
        """`attend` in fewer passes: both parts by flash attention, merged by log-sum-exp."""
        keys, values = self.prefix[layer]
        own_keys, own_values = (x[:, :, : self.steps_done + 1] for x in self.own[layer])
        q = query.unflatten(1, (keys.shape[1], -1))
        far = flash_cpu(
            self._of_prompts(q), keys, values, 0.0, attn_mask=self.added_mask, scale=scale
        )
        far, far_lse = map(self._of_rows, far)
        near, near_lse = flash_cpu(q, own_keys, own_values, 0.0, scale=scale)
        share = torch.sigmoid(near_lse - far_lse)[..., None]
        return torch.lerp(far, near, share).flatten(1, 2)

    def _of_prompts(self, x: Tensor) -> Tensor:
        """(B, K, R, ...) -> (P, K, G R, ...): the rows that share a prompt's keys."""
        return x.unflatten(0, (-1, self.group_size)).transpose(1, 2).flatten(2, 3)

    def _of_rows(self, x: Tensor) -> Tensor:
        """(P, K, G R, ...) -> (B, K, R, ...)"""
        return x.unflatten(2, (self.group_size, -1)).transpose(1, 2).flatten(0, 1)

    def _first(self, window: int | None) -> int:
        return 0 if window is None else max(self.steps_done + 1 - window, 0)

    def _hidden(self, window: int | None) -> Tensor | None:
        """(P, L) prompt keys a query of this step does not see; None: it sees all."""
        if window is None:
            return self.padding if self.ragged else None
        position = self.lengths[:, None] + self.steps_done
        return self.padding | (position - self.column >= window)


def _padded(rows: list[Tensor]) -> Tensor:
    """(P_i, K, D) tensors as (P, K, L, D), zero beyond each length."""
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded.transpose(1, 2).contiguous()
