# SPDX-License-Identifier: Apache-2.0
"""Ways to get a packed row wrong. Each is a function of pytest's monkeypatch."""

import copy

import torch

from fastgrpo.packing.layout import GroupLayout
from fastgrpo.packing.row import PackedRow
from fastgrpo.recurrence import branches, gated_delta_rule


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


def _orphaned(chunks):
    """The same chunks, none of a completion going on from its prompt's last."""
    other = copy.copy(chunks)
    other.parents = chunks.parents.masked_fill(
        torch.isin(chunks.parents, chunks.last), chunks.count
    )
    other.levels = [
        level._replace(parents=other.parents[level.start : level.end]) for level in chunks.levels
    ]
    return other


def state_zeroed(patch):
    """Completions start from nothing."""
    chunks = branches.Branches.chunks
    patch.setattr(branches.Branches, "chunks", lambda self: _orphaned(chunks(self)))


def state_gradient_cut(patch):
    """Completions start from their prompt's state, which learns nothing from them."""
    scan = gated_delta_rule._scan_backward
    patch.setattr(
        gated_delta_rule,
        "_scan_backward",
        lambda *given: scan(*given[:-1], _orphaned(given[-1])),
    )


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
