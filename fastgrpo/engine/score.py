# SPDX-License-Identifier: Apache-2.0
"""score: log-probs (and entropies) of every completion of every group."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgrpo.engine.balance import RouterBalance
from fastgrpo.engine.forward import extra_forwards, feature_store, forward_row
from fastgrpo.engine.self_check import self_check as run_self_check
from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.ops.linear.logprob import linear_logprob
from fastgrpo.packing.group import Group, hosted
from fastgrpo.packing.planner import plan_rows, regroup
from fastgrpo.packing.row import PackedRow, check_prompt
from fastgrpo.packing.vision import FeatureStore, Images, KeptFeatures


@dataclass
class GroupScores:
    """One group's lists of (C_i,) tensors; `entropy` is None unless it was asked for."""

    logp: list[Tensor]
    entropy: list[Tensor] | None = None


def score(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    max_tokens: int | None = None,
    backend: str | None = None,
    self_check: bool = True,
    placeholders: str = "refuse",
    entropy_grad: bool = True,
    balance: RouterBalance | None = None,
    workspace_mb: float | None = None,
    features: KeptFeatures | None = None,
    keep_activations: bool = False,
) -> list[GroupScores]:
    """Log-probs of every completion under `model`, each prompt and its images encoded once.

    logp_t = log softmax(logits_t / temperature)[completion_t], with the logits that the plain
    forward of (prompt, completion) gives. Returns per group `.logp`, a list of (C_i,) float32, and
    `.entropy` likewise when "entropy" is in `outputs`; both are differentiable unless under
    `torch.no_grad`. Where a group's `mask` is zero both are 0. (float64 models give float64.)

    `model`: a supported transformers VLM or text LM, plain, PEFT-wrapped or FSDP2-wrapped.
    `max_tokens`: the most tokens of one packed row; None lets rows grow to a sensible size.
    `backend`: the attention implementation, None for the best that can serve.
    `self_check`: compare with the plain forward on one group the first time a model is used.
    `placeholders`: what to do with an image placeholder inside a completion: "refuse" raises,
    "neutralize" feeds another token in its place and leaves it out of the loss (logp 0).
    `entropy_grad`: False makes `.entropy` a constant, which saves its part of backward.
    `balance`: collects what a mixture of experts routes, for its load-balancing loss.
    `workspace_mb`: that of `linear_logprob`. `features`: image features of earlier calls, of a
    model in which nothing before the decoder is trained. `keep_activations`: under activation
    checkpointing recompute only what would take more memory than the padded step that recomputes
    all (see `engine.activations`).

    Raises `InputError` naming the sample, or the reason why the model is not served.
    """
    adapter, groups = Adapter(model), hosted(groups)
    chosen = adapter.prepare(backend)
    if self_check:
        run_self_check(adapter, groups, chosen, score_row)
    rows = pack(adapter, groups, chosen, max_tokens=max_tokens, placeholders=placeholders)
    empty = torch.zeros(0, device=adapter.device)
    results = [
        GroupScores([empty] * len(g.completions), [empty] * len(g.completions)) for g in groups
    ]
    extra = extra_forwards(adapter, rows)  # a collective: before the forwards, which are too
    store = feature_store(rows, detach=False, kept=features)
    for row in rows:
        with balance.watching(row) if balance else contextlib.nullcontext():
            columns = score_row(
                *(adapter, row, temperature, outputs, store),
                entropy_grad=entropy_grad,
                workspace_mb=workspace_mb,
                keep_activations=keep_activations,
            )
        for column, field in zip(columns, ("logp", "entropy"), strict=False):
            for (g, c), value in zip(row.members, column.split(row.lengths), strict=True):
                getattr(results[g], field)[c] = value
    for _ in range(extra):
        idle = score_row(adapter, rows[-1], temperature, outputs, store)[0]
        g, c = rows[-1].members[0]
        results[g].logp[c] = results[g].logp[c] + idle[:0].sum()  # part of any backward
    if "entropy" not in outputs:
        for result in results:
            result.entropy = None
    return results


def pack(
    adapter: Adapter,
    groups: Sequence[Group],
    backend: str,
    *,
    max_tokens: int | None,
    placeholders: str,
    skip: Set[tuple[int, int]] = frozenset(),
) -> list[PackedRow]:
    """The rows of a pass over `hosted` groups: prompts merged, images made distinct, completions in
    `skip` left out."""
    neutral = neutral_id(adapter, placeholders)
    for group in groups:
        check_prompt(adapter, group)
    parts = regroup(groups, skip)
    images = Images(adapter.family, (part.group for part in parts), groups)
    return [
        PackedRow(adapter, row, groups, backend, images=images, neutral_id=neutral)
        for row in plan_rows(parts, max_tokens)
    ]


def neutral_id(adapter: Adapter, placeholders: str) -> int | None:
    """The token fed in place of an image placeholder a completion sampled; None to refuse it."""
    if placeholders not in ("refuse", "neutralize"):
        raise InputError(f"placeholders must be 'refuse' or 'neutralize', got {placeholders!r}")
    if placeholders == "refuse":
        return None
    return next(i for i in range(3) if i not in adapter.placeholders)


def score_row(
    adapter: Adapter,
    row: PackedRow,
    temperature: float,
    outputs: tuple[str, ...],
    store: FeatureStore,
    *,
    entropy_grad: bool = True,
    workspace_mb: float | None = None,
    keep_activations: bool = False,
) -> tuple[Tensor, ...]:
    """(N,) log-probs of a row's targets, then entropies if asked for."""

    def head(hidden, weight, bias):
        out = linear_logprob(
            hidden,
            weight,
            row.targets,
            bias=bias,
            softcap=adapter.softcap,
            temperature=temperature,
            outputs=outputs,
            entropy_grad=entropy_grad,
            workspace_mb=workspace_mb,
        )
        columns = [out.logp] if out.entropy is None else [out.logp, out.entropy]
        return torch.stack(columns, -1)

    columns = forward_row(adapter, row, head, store, keep_activations=keep_activations)
    return columns.unbind(-1)
