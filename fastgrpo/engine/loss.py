# SPDX-License-Identifier: Apache-2.0
"""The loss of packed rows: projection, loss and both gradients inside the model's forward."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.advantages.perception import quantile_mask
from fastgrpo.engine.balance import RouterBalance
from fastgrpo.engine.continuation import KeptPrompts
from fastgrpo.engine.forward import extra_forwards, feature_store, forward_row
from fastgrpo.engine.score import GroupScores, pack
from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.objective import KLStream, KLTerm, Objective
from fastgrpo.ops.grpo_loss import GRPOLoss
from fastgrpo.ops.linear.grpo import linear_grpo_loss
from fastgrpo.ops.linear.logprob import linear_logprob
from fastgrpo.ops.token_kl import token_kl
from fastgrpo.packing.group import Group, hosted
from fastgrpo.packing.host import device_copies, on_host
from fastgrpo.packing.row import PackedRow
from fastgrpo.packing.vision import FeatureStore, KeptFeatures

OPTIONAL = ("old_logp", "ref_logp", "rollout_logp", "token_weights")
_SHARE_CLAMP = 10.0  # PAPO chooses tokens by a divergence clamped there

Member = tuple[int, int]  # (group, completion)


@dataclass(frozen=True)
class RowLoss:
    """What the rows of a step minimise: an objective, KL streams and the sampled entropy.

        loss = grpo_loss + sum_i c_i kl_i - s mean log p       (all over one denominator)

    `kl_streams` name log-probs the groups carry in `Group.streams`; s is `sampled_entropy_coef`.
    `with_entropy`: measure entropies although nothing needs them. `impl`, `workspace_mb`: those of
    `linear_grpo_loss`. `keep_activations`: see `engine.activations`.
    """

    obj: Objective
    kl_streams: Mapping[str, KLStream] = dataclasses.field(default_factory=dict)
    sampled_entropy_coef: float = 0.0
    with_entropy: bool = False
    impl: str | None = None
    workspace_mb: float | None = None
    keep_activations: bool = False

    @property
    def vanishes_with_advantage(self) -> bool:
        """Whether a sequence of advantage 0 has a gradient of 0, whatever the model says."""
        obj = self.obj
        adds = obj.beta != 0.0 or obj.entropy_coef != 0.0
        adds = adds or bool(self.kl_streams) or self.sampled_entropy_coef != 0.0
        return obj.loss.proportional and not adds

    def inputs(
        self, groups: Sequence[Group], members: Sequence[Member], mask: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The loss's inputs for the tokens of some completions, in order, on the mask's device.

        `groups` are `hosted`; what of them lies on the host is sent at once.
        """
        device = mask.device
        lengths = torch.tensor([groups[g].lengths[c] for g, c in members], dtype=torch.int64)

        def joined(values: Iterable[Tensor]) -> Tensor:
            values = list(values)
            if not all(on_host(x) for x in values):
                values = [x.to(device) for x in values]
            return torch.cat([x.to(dtype) for x in values]) if values else torch.zeros(0).to(dtype)

        columns = {"seq_ids": torch.repeat_interleave(lengths)}
        if all(isinstance(group.advantages, Tensor) for group in groups):
            columns["advantages"] = joined(groups[g].advantages[c][None] for g, c in members)
        else:
            columns["advantages"] = joined(groups[g].token_advantages(c) for g, c in members)
        for name in OPTIONAL:
            if groups[0].__dict__[name] is not None:
                columns[name] = joined(getattr(groups[g], name)[c] for g, c in members)
        streams = [
            joined(groups[g].streams[name][c] for g, c in members) for name in self.kl_streams
        ]
        given = [*columns.values(), *streams]
        arrived = iter(device_copies([x for x in given if on_host(x)], device))
        given = [next(arrived) if on_host(x) else x for x in given]
        batch = dict(zip(columns, given, strict=False)) | {"mask": mask}
        terms = zip(self.kl_streams.values(), given[len(columns) :], strict=True)
        batch["kl_terms"] = [stream.term(logp) for stream, logp in terms]
        return batch

    def __call__(
        self,
        adapter: Adapter,
        row: PackedRow,
        batch: dict,
        store: FeatureStore,
        *,
        backward_scale: float | None = None,
    ) -> tuple[GRPOLoss, Tensor]:
        """The row's result, and its loss as it leaves the model (one tensor, seen by its hooks).

        `batch`: the `inputs` of the row's members and the denominators of the step.
        `backward_scale`: what the caller multiplies the loss by before its backward, which runs in
        any case. With it the head's gradient may be added to the one already there in the forward.
        """
        results: list[GRPOLoss] = []

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            given = batch
            if backward_scale is not None and self._adds_in_place(hidden, weight):
                given = batch | {"dweight_into": weight.grad, "dweight_scale": backward_scale}
            columns = (hidden, weight, bias, row.targets, given)
            results.append(self.of_hidden(*columns, softcap=adapter.softcap))
            return results[0].loss[None]

        loss = forward_row(adapter, row, head, store, keep_activations=self.keep_activations)[0]
        return results[0], loss

    def _adds_in_place(self, hidden: Tensor, weight: Tensor) -> bool:
        """Whether autograd would only add dweight to a float32 gradient, seen by no hook: on the
        CPU that saves a (V, D) buffer and a pass over it. (A GPU may keep the exponentials instead,
        and would look for overflow at each chunk.)"""
        if weight.device.type != "cpu" or self.workspace_mb is not None or self.impl == "reference":
            return False
        if torch.compiler.is_compiling():
            return False
        if not (weight.is_leaf and weight.requires_grad and hidden.requires_grad):
            return False
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            return False
        grad, wide = weight.grad, torch.promote_types(weight.dtype, torch.float32)
        return type(grad) is Tensor and grad.dtype == wide and grad.is_contiguous()

    def of_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        batch: dict,
        *,
        softcap: float | None = None,
    ) -> GRPOLoss:
        """The loss of (N, D) hidden states that predict `targets` (N,)."""
        given = dict(batch)
        if any(stream.token_share is not None for stream in self.kl_streams.values()):
            given["kl_terms"] = self._chosen(hidden, weight, bias, targets, batch, softcap)
        return linear_grpo_loss(
            hidden,
            weight,
            targets,
            given.pop("advantages"),
            self.obj,
            bias=bias,
            softcap=softcap,
            impl=self.impl,
            workspace_mb=self.workspace_mb,
            with_entropy=self.with_entropy,
            sampled_entropy_coef=self.sampled_entropy_coef,
            **given,
        )

    @torch.no_grad()
    def _chosen(self, hidden, weight, bias, targets, batch: dict, softcap) -> list[KLTerm]:
        """The KL terms on the share of each sequence's tokens that diverge most."""
        logp = linear_logprob(
            hidden, weight, targets, bias=bias, softcap=softcap, temperature=self.obj.temperature
        ).logp
        terms = []
        for stream, term in zip(self.kl_streams.values(), batch["kl_terms"], strict=True):
            if stream.token_share is not None:
                clamps = {"log_ratio_clamp": term.log_ratio_clamp, "value_clamp": _SHARE_CLAMP}
                kl = token_kl(logp, term.other_logp, term.estimator, **clamps)
                chosen = quantile_mask(kl, batch["seq_ids"], stream.token_share, batch["mask"])
                term = dataclasses.replace(term, mask=chosen)
            terms.append(term)
        return terms


@dataclass
class StepLoss:
    """A differentiable loss and what it was made of: (C_i,) log-probs and entropies by group, and
    each row's result."""

    loss: Tensor
    scores: list[GroupScores]
    results: list[GRPOLoss]


def loss_of_groups(
    loss: RowLoss,
    adapter: Adapter,
    groups: Sequence[Group],
    *,
    num_tokens: float,
    num_sequences: float,
    max_tokens: int | None = None,
    backend: str | None = None,
    placeholders: str = "refuse",
    balance: RouterBalance | None = None,
    features: KeptFeatures | None = None,
    prompts: KeptPrompts | None = None,
) -> StepLoss:
    """The loss of `groups` as one tensor whose backward gives every gradient.

    (For a loop that calls backward itself; `GRPOStep` does so row by row.) The log-probs and
    entropies it returns are constants. The denominators are those of the optimizer step. `balance`
    as in `score`: its loss is the caller's to add. `features`: as there. `prompts`: those of the
    rollout, which rows of completions go on from; a balance needs them in the row.
    """
    groups = hosted(groups)
    rows = pack(
        adapter,
        groups,
        adapter.prepare(backend),
        max_tokens=max_tokens,
        placeholders=placeholders,
    )
    if prompts is not None and balance is None:
        rows = prompts.continued(rows)
    if loss.obj.top_entropy_quantile < 1.0 and len(rows) > 1:
        raise InputError(
            f"top_entropy_quantile={loss.obj.top_entropy_quantile} ranks the tokens of the whole "
            f"step, which takes {len(rows)} rows; raise max_tokens"
        )
    empty = torch.zeros(0, device=adapter.device)
    scores = [
        GroupScores([empty] * len(g.completions), [empty] * len(g.completions)) for g in groups
    ]
    totals = {"num_tokens": num_tokens, "num_sequences": num_sequences}
    extra = extra_forwards(adapter, rows)  # a collective: before the forwards, which are too
    store, parts, results = feature_store(rows, detach=False, kept=features), [], []
    for row in rows:
        batch = loss.inputs(groups, row.members, row.mask, loss_dtype(adapter))
        with balance.watching(row) if balance else contextlib.nullcontext():
            result, part = loss(adapter, row, batch | totals, store)
        parts.append(part)
        results.append(result)
        for column, field in ((result.logp, "logp"), (result.entropy, "entropy")):
            if column is not None:
                for (g, c), value in zip(row.members, column.split(row.lengths), strict=True):
                    getattr(scores[g], field)[c] = value
    for _ in range(extra):  # the last row again; no token of it counts
        parts.append(loss(adapter, rows[-1], without_tokens(batch) | totals, store)[1])
    return StepLoss(torch.stack(parts).sum() if parts else empty.sum(), scores, results)


def without_tokens(batch: dict) -> dict:
    """The inputs of a row that is run for the other ranks' sake."""
    return batch | {"mask": torch.zeros_like(batch["mask"])}


def loss_dtype(adapter: Adapter) -> torch.dtype:
    """float64 for a float64 model, else float32."""
    double = next(adapter.core.parameters()).dtype == torch.float64
    return torch.float64 if double else torch.float32
