# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a rollout: each prompt's once for its G completions, then each row's own.

Letters: P prompts, G completions per prompt, B = P G rows (prompt after prompt), L the longest
prompt, H query heads, K key heads, D head size, R = H / K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrpo.attention.registry import get_backend
from fastgrpo.rollout.recurrent import ForksStates, RecordsStates, States


class Prefill(RecordsStates):
    """Stands in for a GroupLayout of prompts alone and keeps every layer's keys and values, and
    the final states of recurrent layers."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.total = layout, layout.total
        self.modules: list[nn.Module] = []
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.recording = True  # not where a checkpointed layer is computed again

    def attend(
        self, module, query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None
    ):
        """The backend's attention over the prompts; called by the layers in order."""
        if self.recording:
            self.modules.append(module)
            self.layers.append((key, value))
        attend = get_backend(self.layout.backend).attend
        return attend(query, key, value, self.layout, scale=scale, window=window)


class DecodeState(ForksStates):
    """One step of all rows: a packed row of B tokens, each the next of its own completion.

    `prefixes` holds, prompt after prompt, each layer's (P_i, K, D) keys and values, `states` what
    its recurrent layers left. Every step reads a prompt's keys once for its G rows. Steps have the
    same shapes but for the number of tokens decoded so far.
    """

    steps_done: int | Tensor

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
        self.prefix = [  # keys (P, K, D, L), as a product with queries reads them, and values
            (
                _padded([layers[n][0] for layers in prefixes]).transpose(2, 3).contiguous(),
                _padded([layers[n][1] for layers in prefixes]),
            )
            for n in range(len(prefixes[0]))
        ]
        sample = self.prefix[0][1]
        self.lengths = lengths.to(sample.device)
        column = torch.arange(sample.shape[2], device=sample.device)
        self.column, self.padding = column, column >= self.lengths[:, None]  # (P, L)
        self.own = [  # (B, K, steps, D)
            tuple(
                x.new_empty(self.total, x.shape[1], steps, size)
                for x, size in ((keys, keys.shape[2]), (values, values.shape[3]))
            )
            for keys, values in self.prefix
        ]

    def attend(
        self, module, query: Tensor, key: Tensor, value: Tensor, layout, *, scale, window=None
    ):
        """(B, H, D) of this step's queries over prompt and own keys, this step's included."""
        layer = self.calls % len(self.prefix)
        self.calls += 1
        own_key, own_value = self.own[layer]
        self._append(own_key, key)
        self._append(own_value, value)
        prefix_key, prefix_value = self.prefix[layer]
        own, unseen = self._own(window)
        q = (query * scale).unflatten(1, (own_key.shape[1], -1))  # (B, K, R, D)
        far = self._of_prompts(q) @ prefix_key  # (P, K, G R, L)
        if (hidden := self._hidden(window)) is not None:
            far.masked_fill_(hidden[:, None, None], float("-inf"))
        near = self._of_prompts(q @ own_key[:, :, own].transpose(2, 3))  # (P, K, G R, own tokens)
        if unseen is not None:
            near.masked_fill_(unseen, float("-inf"))
        scores = torch.cat([far, near], -1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        share = scores.softmax(-1, dtype=wide).to(value.dtype)
        far, near = share.split([far.shape[-1], near.shape[-1]], -1)
        out = self._of_rows(far @ prefix_value)
        out += self._of_rows(near) @ own_value[:, :, own]
        return out.to(query.dtype).flatten(1, 2)

    def _of_prompts(self, x: Tensor) -> Tensor:
        """(B, K, R, ...) -> (P, K, G R, ...): the rows that share a prompt's keys."""
        return x.unflatten(0, (-1, self.group_size)).transpose(1, 2).flatten(2, 3)

    def _of_rows(self, x: Tensor) -> Tensor:
        """(P, K, G R, ...) -> (B, K, R, ...)"""
        return x.unflatten(2, (self.group_size, -1)).transpose(1, 2).flatten(0, 1)

    def _append(self, own: Tensor, new: Tensor) -> None:
        own[:, :, self.steps_done] = new

    def _own(self, window: int | None) -> tuple[slice, Tensor | None]:
        """The own tokens a step reads, and which of them it does not see (None: it sees all)."""
        t = self.steps_done
        return slice(0 if window is None else max(t + 1 - window, 0), t + 1), None

    def _hidden(self, window: int | None) -> Tensor | None:
        """(P, L) prompt keys a query of this step does not see; None: it sees all."""
        if window is None:
            return self.padding if self.ragged else None
        position = self.lengths[:, None] + self.steps_done
        return self.padding | (position - self.column >= window)


class FixedDecodeState(DecodeState):
    """Steps of one shape, which a CUDA graph can repeat: each reads the first `width` own tokens,
    and a tensor says how far the rows are. Whatever a step changes it changes in place.
    """

    def __init__(self, *args):
        super().__init__(*args)
        for own in self.own:
            for x in own:
                x.zero_()  # a token that is masked is multiplied by 0, and must be finite
        self.steps_done = torch.zeros(1, dtype=torch.int64, device=self.lengths.device)
        self.width = self.own[0][0].shape[2]
        self.positions = torch.arange(self.width, device=self.lengths.device)
        self.unseen: dict[int | None, Tensor] = {}  # of this step, by window

    def restart(self) -> None:
        """The next call is a step's first, whatever an earlier step came to."""
        self.calls = self.convolutions = self.rules = 0

    def _append(self, own: Tensor, new: Tensor) -> None:
        own.index_copy_(2, self.steps_done, new[:, :, None])

    def _own(self, window: int | None) -> tuple[slice, Tensor | None]:
        if self.calls % len(self.prefix) == 1 % len(self.prefix):
            self.unseen = {}  # in the first layer
        if window not in self.unseen:
            age = self.steps_done - self.positions[: self.width]
            self.unseen[window] = (age < 0) if window is None else (age < 0) | (age >= window)
        return slice(0, self.width), self.unseen[window]

    def _hold(self, held: list[Tensor], layer: int, value: Tensor) -> None:
        held[layer].copy_(value)


def _padded(rows: list[Tensor]) -> Tensor:
    """(P_i, K, D) tensors as (P, K, L, D), zero beyond each length."""
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded.transpose(1, 2).contiguous()
