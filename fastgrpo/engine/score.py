"""score: log-probs (and entropies) of every completion of every group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.engine.forward import forward_row
from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.ops.linear_logprob import linear_logprob
from fastgrpo.packing.group import Group
from fastgrpo.packing.planner import plan_rows, regroup
from fastgrpo.packing.row import PackedRow


@dataclass
class GroupScores:
    """One group's lists of (C_i,) tensors; `entropy` is None unless it was asked for."""

    logp: list[Tensor]
    entropy: list[Tensor] | None = None


def score(
    model,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    max_tokens: int | None = None,
    backend: str | None = None,
    placeholders: str = "refuse",
) -> list[GroupScores]:
    """Log-probs of every completion under `model`, each prompt and its images encoded once.

    logp_t = log softmax(logits_t / temperature)[completion_t], with the logits that the plain
    forward of (prompt, completion) gives. Returns per group `.logp`, a list of (C_i,) float32, and
    `.entropy` likewise when "entropy" is in `outputs`; both are differentiable unless under
    `torch.no_grad`. Where a group's `mask` is zero both are 0.

    `model`: a supported transformers VLM or text LM, plain, PEFT-wrapped or FSDP2-wrapped.
    `max_tokens`: the most tokens of one packed row; None lets rows grow to a sensible size.
    `backend`: the attention implementation, None for the best that can serve.
    `placeholders`: what to do with an image placeholder inside a completion: "refuse" raises,
    "neutralize" feeds another token in its place and leaves it out of the loss (logp 0).

    Raises `InputError` naming the sample, or the reason why the model is not served.
    """
    adapter = Adapter(model)
    chosen = adapter.prepare(backend)
    results = [
        GroupScores([None] * len(g.completions), [None] * len(g.completions)) for g in groups
    ]
    for parts in plan_rows(regroup(groups), max_tokens):
        row = PackedRow(adapter, parts, groups, chosen, neutral_id(adapter, placeholders))
        logp, entropy = score_row(adapter, row, temperature, outputs)
        for (g, c), value in row.split(logp):
            results[g].logp[c] = value
        if entropy is not None:
            for (g, c), value in row.split(entropy):
                results[g].entropy[c] = value
    if "entropy" not in outputs:
        for result in results:
            result.entropy = None
    return results


def score_row(
    adapter: Adapter, row: PackedRow, temperature: float, outputs: tuple[str, ...]
) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probs of a row's targets, and entropies if asked for."""

    def head(hidden, weight, bias):
        out = linear_logprob(
            hidden, weight, row.targets, bias=bias, temperature=temperature, outputs=outputs
        )
        columns = [out.logp] if out.entropy is None else [out.logp, out.entropy]
        return torch.stack(columns, -1)

    values = forward_row(adapter, row, head).unbind(-1)
    return values[0], values[1] if len(values) > 1 else None


def neutral_id(adapter: Adapter, placeholders: str) -> int | None:
    """The token fed in place of an image placeholder a completion sampled, None to refuse it."""
    if placeholders == "refuse":
        return None
    if placeholders == "neutralize":
        return next(i for i in range(3) if i not in adapter.placeholders)
    raise InputError(f"placeholders must be 'refuse' or 'neutralize', got {placeholders!r}")
