"""The model's prediction after whole prompts, for all tokens or a few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.head import effective_head, replaced_head, under_autocast
from fastgrpo.packing.group import Group
from fastgrpo.packing.planner import Part, plan_rows
from fastgrpo.packing.row import PackedRow


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
    chosen = adapter.prepare(backend)
    parts = [Part(group, [], []) for group in groups]
    where = {id(part): i for i, part in enumerate(parts)}
    logits: list[Tensor | None] = [None] * len(parts)
    for members in plan_rows(parts, max_tokens):
        row = PackedRow(adapter, members, groups, chosen)
        row.inputs["logits_to_keep"] = row.layout.cu_q[1:].long() - 1
        values = keep_logits(adapter, row.inputs, token_ids)
        for part, value in zip(members, values, strict=True):
            logits[where[id(part)]] = value
    return torch.stack(logits) if logits else torch.zeros(0, len(token_ids or ()))


def keep_logits(adapter: Adapter, inputs: dict, token_ids: Sequence[int] | None = None) -> Tensor:
    """(rows, V or K) float32 logits of the rows that `inputs` asks the model to keep."""

    def project(hidden: Tensor) -> Tensor:
        x, weight, bias = under_autocast(hidden, *effective_head(adapter.head))
        if token_ids is not None:
            ids = torch.as_tensor(list(token_ids), device=weight.device)
            weight, bias = weight[ids], None if bias is None else bias[ids]
        return nn.functional.linear(x, weight, bias).float()

    with replaced_head(adapter.head, project):
        return adapter.root(**inputs).logits[0]
