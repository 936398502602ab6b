# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers of a rollout: a prompt's state and convolution tail once, forked to its rows.

Letters: P prompts, G completions per prompt, B = P G rows, C channels and W width of the
convolution, H heads, K and V head sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.recurrence.branches import convolve, last_inputs, prompt_states

# One prompt's (C, W - 1) last inputs and (H, K, V) state, for each recurrent layer.
States = list[tuple[Tensor, Tensor]]


class RecordsStates:
    """Keeps every recurrent layer's final state of a row of prompts; `layout` is the row's."""

    def __init__(self):
        self.tails: list[Tensor] = []  # (P, C, W - 1)
        self.states: list[Tensor] = []  # (P, H, K, V)

    def convolve(self, original, mixed: Tensor, weight: Tensor, bias, activation) -> Tensor:
        self.tails.append(last_inputs(mixed, weight.shape[-1], self.layout))
        return convolve(original, mixed, weight, bias, activation, self.layout)

    def delta_rule(self, rule, step, inputs, **options) -> Tensor:
        out, state = prompt_states(rule, inputs, self.layout, **options)
        self.states.append(state)
        return out

    def states_of(self, prompt: int) -> States:
        return [(t[prompt], s[prompt]) for t, s in zip(self.tails, self.states, strict=True)]


class ForksStates:
    """Each row's own state and tail, which a step moves on by one token."""

    def __init__(self, prompts: list[States], group_size: int):
        self.tails, self.recurrent = [], []
        for layer in zip(*prompts, strict=True):
            tails, states = map(torch.stack, zip(*layer, strict=True))
            self.tails.append(tails.repeat_interleave(group_size, 0))  # (B, C, W - 1)
            self.recurrent.append(states.repeat_interleave(group_size, 0))  # (B, H, K, V)
        self.convolutions = self.rules = 0

    def convolve(self, original, mixed: Tensor, weight: Tensor, bias, activation) -> Tensor:
        """(1, C, B) outputs of this step's inputs (1, C, B), one a row."""
        layer = self.convolutions % len(self.tails)
        self.convolutions += 1
        window = torch.cat([self.tails[layer], mixed[0].T[:, :, None]], 2)  # (B, C, W)
        self._hold(self.tails, layer, window[:, :, 1:])
        return original(window, weight, bias, activation=activation)[:, :, -1].T[None]

    def delta_rule(self, rule, step, inputs, **options) -> Tensor:
        """(1, B, H, V): every row's rule by one token."""
        layer = self.rules % len(self.recurrent)
        self.rules += 1
        q, k, v, g, beta = (x.transpose(0, 1) for x in inputs)  # (B, 1, ...)
        state = self.recurrent[layer]
        out, state = step(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, **options
        )
        self._hold(self.recurrent, layer, state)
        return out.transpose(0, 1)

    def _hold(self, held: list[Tensor], layer: int, value: Tensor) -> None:
        held[layer] = value
