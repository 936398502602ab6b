# SPDX-License-Identifier: Apache-2.0
"""Ways to get a packed row wrong. Each is a function of pytest's monkeypatch."""

import torch

from fastgrpo.packing.layout import GroupLayout
from fastgrpo.packing.row import PackedRow
from fastgrpo.recurrence import branches


def one_causal_row(patch):
    """Attention over the row as if it were one sequence: what a model without a hook does."""

    def causal(layout, window=None):
        return torch.ones(layout.total, layout.total, dtype=torch.bool).tril()

    patch.setattr(GroupLayout, "dense_mask", causal)


def positions_go_on(patch):
    """A completion continues the row's positions, not its own prompt's."""
    init = PackedRow.__init__

    def build(self, *args, **kwargs):
        init(self, *args, **kwargs)
        position = self.inputs["position_ids"]
        self.inputs["position_ids"] = torch.arange(position.shape[-1]).expand_as(position)

    patch.setattr(PackedRow, "__init__", build)


def blocks_forgotten(patch):
    """Causal inside an image or a prompt whose tokens see one another both ways."""
    mask = GroupLayout.dense_mask

    def causal(layout, window=None):
        allowed = mask(layout, window)
        return allowed & torch.ones_like(allowed).tril()

    patch.setattr(GroupLayout, "dense_mask", causal)


def window_forgotten(patch):
    """Sliding layers that see the whole prefix."""
    mask = GroupLayout.dense_mask
    patch.setattr(GroupLayout, "dense_mask", lambda layout, window=None: mask(layout, None))


def _run_with(patch, change):
    run = branches.Sequences.run

    def changed(self, rule, inputs, state, *args, **kwargs):
        state = None if state is None else change(state)
        return run(self, rule, inputs, state, *args, **kwargs)

    patch.setattr(branches.Sequences, "run", changed)


def state_zeroed(patch):
    """Completions start from nothing."""
    _run_with(patch, torch.zeros_like)


def state_gradient_cut(patch):
    """Completions start from their prompt's state, which learns nothing from them."""
    _run_with(patch, torch.Tensor.detach)


def convolution_leaks(patch):
    """Windows that reach into the segment before."""

    def leak(original, mixed, weight, bias, activation, layout):
        return original(mixed, weight, bias, activation=activation)

    patch.setattr("fastgrpo.recurrence.seams.convolve", leak)


def rule_leaks(patch):
    """The state of a completion goes on into the next: what a mixer without a hook does."""

    def leak(rule, inputs, layout, **options):
        q, k, v, g, beta = inputs
        return rule(q, k, v, g=g, beta=beta, **options)[0]

    patch.setattr("fastgrpo.recurrence.seams.delta_rule", leak)
