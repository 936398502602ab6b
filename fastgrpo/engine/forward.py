# SPDX-License-Identifier: Apache-2.0
"""One forward of a packed row through the model the caller trains."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgrpo.engine.activations import kept_activations
from fastgrpo.engine.parallel import busiest, distributed, in_shards
from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.head import effective_head, replaced_head, without_softcap
from fastgrpo.ops.autocast import under_autocast
from fastgrpo.ops.gather_rows import gather_rows
from fastgrpo.packing.row import PackedRow
from fastgrpo.packing.vision import FeatureStore, KeptFeatures, idle_tower, shared_features

_CALL_ON_CPU = 2**20  # numbers that a call of the tower is given


def forward_row(
    adapter: Adapter,
    row: PackedRow,
    head: Callable[..., Tensor],
    store: FeatureStore,
    *,
    keep_activations: bool = False,
) -> Tensor:
    """Run the model on `row`; returns head(hidden (N, D), weight (V, D), bias) as a tensor.

    `head` is called where the model calls its lm_head, inside the root's forward, and its result
    leaves through the model's output, so that the hooks of FSDP and ZeRO see both. Where the model
    caps its logits (`adapter.softcap`) it does. `keep_activations`: see `engine.activations`.
    """

    def project(hidden: Tensor) -> Tensor:
        kept = row.inputs["logits_to_keep"]
        if hidden.shape[1] != len(kept):  # a model that does not know logits_to_keep
            hidden = hidden.index_select(1, kept)
        # (1, U, D) distinct predicting rows -> (N, D): the prompt's last row serves G completions
        hidden = gather_rows(row.predicting(hidden[0]), row.layout.predictors())
        # A fresh tensor, not a view: FSDP's hook on the output would be lost with a view.
        return torch.stack([head(*under_autocast(hidden, *effective_head(adapter.head)))])

    with contextlib.ExitStack() as inside:
        if keep_activations:
            inside.enter_context(kept_activations(adapter, row, store))
        inside.enter_context(replaced_head(adapter.head, project))
        inside.enter_context(without_softcap(adapter.text_config))  # `head` caps its logits
        images = inside.enter_context(row_images(adapter, row, store))
        output = adapter.forward(row.inputs | images)
    logits = output.logits if hasattr(output, "logits") else output[0]
    return logits[0]


def feature_store(
    rows: Sequence[PackedRow],
    *,
    detach: bool,
    every: bool = False,
    kept: KeptFeatures | None = None,
) -> FeatureStore:
    """A store for the images that several rows use; `every` keeps all (for several passes of this
    call), `kept` holds them for other calls too, of a model whose features are constant."""
    if kept is not None and rows:
        return kept.store(rows[0].images)
    uses = Counter(i for row in rows for i in set(row.image_ids))
    if distributed():
        # A rank that skipped its vision tower would leave the others waiting in a collective.
        return FeatureStore(set())
    return FeatureStore({i for i, n in uses.items() if every or n > 1}, detach=detach)


def extra_forwards(adapter: Adapter, rows: Sequence[PackedRow]) -> int:
    """How many more rows the busiest rank has: a sharded model's forwards are collective, so this
    rank repeats its last row as often, to no effect."""
    most = busiest(len(rows), adapter.device)
    if not rows and most:
        raise InputError("this rank has no completion with a token, while other ranks have some")
    return most - len(rows)


@contextlib.contextmanager
def row_images(adapter: Adapter, row: PackedRow, store: FeatureStore):
    """The vision arguments of the forward: each distinct image or video not in the store yet."""
    if not row.image_ids:
        # A rank without images joins the other ranks in the tower's collectives.
        idle = adapter.family.vision_inputs and distributed()
        with idle_tower(adapter) if idle else contextlib.nullcontext({}) as inputs:
            yield inputs
        return
    wanted = row.images.by_kind(row.image_ids)
    missing = {kind: store.missing(ids) for kind, ids in wanted.items()}
    calls = {kind: _encoder_calls(adapter, row, ids) for kind, ids in missing.items()}
    alone = any(row.images.company(adapter.config, ids) for ids in wanted.values())
    joined = missing == wanted and all(len(some) == 1 for some in calls.values())
    if joined and store.keep.isdisjoint(row.image_ids) and not alone:
        inputs: dict[str, Tensor] = {}
        for ids in wanted.values():
            inputs |= row.images.inputs(ids, adapter.device)
        yield inputs
        return
    with shared_features(adapter, row.images, wanted, calls, store) as inputs:
        yield inputs


def _encoder_calls(adapter: Adapter, row: PackedRow, ids: list[int]) -> list[list[int]]:
    """The images, or videos, of each call of the tower: all in one.

    On a CPU, whose caches the activations of many would leave, one by one, small ones together;
    not with weights in shards, where a call is a collective.
    """
    one_by_one = adapter.device.type == "cpu" and adapter.family.varlen_tower
    if not (ids and one_by_one) or in_shards(adapter.core):
        return [ids] if ids else []
    calls: list[list[int]] = []
    size = _CALL_ON_CPU
    for i in ids:
        if size >= _CALL_ON_CPU:
            calls.append([])
            size = 0
        calls[-1].append(i)
        size += sum(x.numel() for x in row.images.distinct[i].values())
    return calls
