# SPDX-License-Identifier: Apache-2.0
"""The model's prediction after whole prompts, for all tokens or a few."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo.engine.activations import kept_activations
from fastgrpo.engine.continuation import KeptPrompts
from fastgrpo.engine.forward import feature_store, row_images
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.head import effective_head, replaced_head
from fastgrpo.ops.autocast import under_autocast
from fastgrpo.packing.group import Group, hosted
from fastgrpo.packing.planner import Part, plan_rows
from fastgrpo.packing.row import PackedRow, check_prompt
from fastgrpo.packing.vision import Images, KeptFeatures


def next_token_logits(
    model,
    groups: Sequence[Group],
    *,
    token_ids: Sequence[int] | None = None,
    max_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Logits of the token after each group's prompt, (P, V) float32, or (P, K) for K `token_ids`.

    Prompts are packed, nothing is padded, and with `token_ids` only those rows of the head are
    multiplied: a softmax over them is a judge's restricted-vocabulary probability. Differentiable
    unless under `torch.no_grad`. Completions of the groups are ignored. Raises `InputError`.
    """
    adapter = Adapter(model)
    logits: list[Tensor | None] = [None] * len(groups)
    for step in prompt_passes(adapter, groups, max_tokens, backend, token_ids):
        for i, value in zip(step.members, step.logits, strict=True):
            logits[i] = value
    return torch.stack(logits) if logits else torch.zeros(0, len(token_ids or ()))


class PromptPass(NamedTuple):
    """One forward of some prompts: the row, its groups' indices, the logits of the token after each
    (rows, V or K), the hidden states they come from (rows, D), and the bytes of activations left to
    what goes on from it."""

    row: PackedRow
    members: list[int]
    logits: Tensor
    hidden: Tensor
    spare: float


def prompt_passes(
    adapter: Adapter,
    groups: Sequence[Group],
    max_tokens: int | None,
    backend: str | None,
    token_ids: Sequence[int] | None = None,
    observe=lambda layout: layout,
    features: KeptFeatures | None = None,
    keep: KeptPrompts | None = None,
    copies: int = 1,
) -> Iterator[PromptPass]:
    """The forwards of all prompts.

    `observe(layout)` may put something in the layout's place that attends for it. `features`: as
    in `score`. For `keep` they have gradients, and keep activations as a training forward does that
    has each prompt `copies` times where rows are padded.
    """
    chosen, groups = adapter.prepare(backend), hosted(groups)
    for group in groups:
        check_prompt(adapter, group)
    parts = [Part(group, [], []) for group in groups]
    index = {id(part): i for i, part in enumerate(parts)}
    images = Images(adapter.family, groups)
    rows = [
        PackedRow(adapter, members, groups, chosen, images=images, neutral_id=None)
        for members in plan_rows(parts, max_tokens)
    ]
    store = feature_store(rows, detach=False, kept=features)
    for row in rows:
        row.padded_tokens = copies * row.layout.total
        row.padded_image_ids = copies * row.image_ids
        ends = row.layout.cu_q[1:].long() - 1
        inputs = row.inputs | {"logits_to_keep": ends, "fg_layout": observe(row.layout)}
        hidden, spare = [], 0.0
        with contextlib.ExitStack() as inside:
            if keep:
                inside.enter_context(torch.enable_grad())
            if keep and keep.keep_activations:
                spare = inside.enter_context(kept_activations(adapter, row, store))
            vision = inside.enter_context(row_images(adapter, row, store))
            last = keep_logits(adapter, inputs | vision, token_ids, hidden)
        yield PromptPass(row, [index[id(part)] for part in row.parts], last, hidden[0], spare)


def keep_logits(
    adapter: Adapter,
    inputs: dict,
    token_ids: Sequence[int] | None = None,
    seen: list[Tensor] | None = None,
) -> Tensor:
    """(rows, V or K) float32 logits of the rows that `inputs` asks the model to keep; their hidden
    states (rows, D) are appended to `seen`."""

    def project(hidden: Tensor) -> Tensor:
        kept = inputs.get("logits_to_keep")
        if kept is not None and hidden.shape[1] != len(kept):  # a model that does not know it
            hidden = hidden.index_select(1, kept)
        if seen is not None:
            seen.append(hidden[0])
        x, weight, bias = under_autocast(hidden, *effective_head(adapter.head))
        if token_ids is not None:
            ids = torch.as_tensor(list(token_ids), device=weight.device)
            weight, bias = weight[ids], None if bias is None else bias[ids]
        return nn.functional.linear(x, weight, bias).float()

    with replaced_head(adapter.head, project):
        return adapter.forward(inputs).logits[0]
