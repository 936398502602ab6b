# SPDX-License-Identifier: Apache-2.0
"""GRPOStep: the gradients of one optimizer step, from whole groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastgrpo.engine.forward import extra_forwards, feature_store
from fastgrpo.engine.loss import OPTIONAL, Member, RowLoss, loss_dtype, without_tokens
from fastgrpo.engine.parallel import distributed
from fastgrpo.engine.score import neutral_id, pack, score_row
from fastgrpo.engine.self_check import self_check as run_self_check
from fastgrpo.errors import InputError
from fastgrpo.losses.tokens import IGNORE
from fastgrpo.models.adapter import Adapter
from fastgrpo.objective import KLStream, Objective
from fastgrpo.ops.grpo_loss import GRPOLoss, grpo_loss, merge_metrics
from fastgrpo.packing.group import Group, hosted
from fastgrpo.packing.row import PackedRow, fed_and_target
from fastgrpo.packing.vision import FeatureStore


class GRPOStep:
    """`metrics = step(groups)` adds the gradients of `obj` over all of `groups` to `.grad`.

    The loss is that of `grpo_loss` on the log-probs of the plain forward, with the denominators
    of the whole call, so any split into rows gives the same gradient. Nothing is zeroed, clipped
    or stepped: that is the optimizer's business.

    Groups need `advantages`; without `old_logp` they are on-policy (ratio exactly 1). With
    `obj.beta != 0` they need `ref_logp`, or it is computed with `ref_model`, or with the adapters
    of a PEFT model switched off.

    `skip_zero_gradient` leaves out sequences whose gradient is exactly zero (advantage 0 and no
    KL, entropy or other term): same loss, gradient and metrics. For that, `ratio/min` and
    `ratio/max` are not reported off-policy when there is such a sequence, skipped or not.
    `kl_streams` adds KL terms between the policy and log-probs the groups carry under the same
    name in `Group.streams` (an old policy, the policy under a perturbed image, ...), each with its
    own sign, estimator and clamps; `sampled_entropy_coef` adds that times the mean -log-prob.
    `max_tokens`, `backend`, `self_check`, `placeholders`, `keep_activations`: as in `score`.
    `impl`, `workspace_mb`: those of `linear_grpo_loss`.

    Returns the loss and TRL's metric names as floats.
    """

    def __init__(
        self,
        model: nn.Module,
        obj: Objective,
        *,
        ref_model: nn.Module | None = None,
        max_tokens: int | None = None,
        backend: str | None = None,
        skip_zero_gradient: bool = True,
        self_check: bool = True,
        placeholders: str = "refuse",
        impl: str | None = None,
        kl_streams: Mapping[str, KLStream] | None = None,
        sampled_entropy_coef: float = 0.0,
        workspace_mb: float | None = None,
        keep_activations: bool = False,
    ) -> None:
        if not isinstance(obj, Objective):
            raise InputError(f"obj must be an Objective, got {type(obj).__name__}")
        self.adapter, self.obj = Adapter(model), obj
        self.loss = RowLoss(
            obj,
            dict(kl_streams or {}),
            sampled_entropy_coef,
            impl=impl,
            workspace_mb=workspace_mb,
            keep_activations=keep_activations,
        )
        self.reference = None if ref_model is None else Adapter(ref_model)
        self.max_tokens, self.backend = max_tokens, backend
        self.skip_zero_gradient = skip_zero_gradient
        self.self_check, self.placeholders = self_check, placeholders

    def __call__(
        self,
        groups: Sequence[Group],
        *,
        num_tokens: float | None = None,
        num_sequences: float | None = None,
        weight: float = 1.0,
    ) -> dict[str, float]:
        """`num_tokens`, `num_sequences`: denominators when `groups` is one rank's share of a step
        (default: the unmasked tokens and the sequences of `groups`). `weight` scales the whole
        loss: calls before one optimizer step add their objectives, J = sum_i w_i J_i."""
        adapter, groups = self.adapter, hosted(groups)
        self._check(groups)
        backend = adapter.prepare(self.backend)
        if self.self_check:
            run_self_check(adapter, groups, backend, score_row)
        idle = self._without_gradient(groups)
        skip = idle if self.skip_zero_gradient and not distributed() else []
        rows = self._pack(adapter, groups, backend, skip)
        idle_mask = self._masks(groups, skip)
        skipped = self._sequences(groups, skip, idle_mask)
        batches = [self._sequences(groups, row.members, row.mask) for row in rows]
        if num_tokens is None:
            num_tokens = sum(row.num_targets for row in rows) + int(idle_mask.sum())
        if num_sequences is None:
            num_sequences = sum(len(group.completions) for group in groups)
        totals = {"num_tokens": float(num_tokens), "num_sequences": float(num_sequences)}

        extra = extra_forwards(adapter, rows)
        for _ in range(extra):  # the last row again, with no token that counts
            rows.append(rows[-1])
            batches.append(without_tokens(batches[-1]))

        results = [self._idle_loss(skipped, totals)] if skip else []
        store = feature_store(rows, detach=True, every=self._shares_tower(groups))
        references = self._reference_logp(groups, rows, store)
        scale = None if distributed() else weight  # other processes' gradients are added by hooks
        for row, batch, ref_logp in zip(rows, batches, references, strict=True):
            if ref_logp is not None:
                batch["ref_logp"] = ref_logp
            result, loss = self.loss(adapter, row, batch | totals, store, backward_scale=scale)
            (weight * loss).backward()
            results.append(result)
        store.backward()
        results = results[: len(results) - extra]
        return self._metrics(results, groups, idle, weight)

    def _idle_loss(self, batch: dict, totals: dict) -> GRPOLoss:
        """Zero loss and the metrics of skipped sequences; any ratio gives the same."""
        batch = dict(batch)
        batch.pop("ref_logp", None)
        logp = batch.get("old_logp")
        if logp is None:
            logp = torch.zeros_like(batch["mask"], dtype=loss_dtype(self.adapter))
        batch |= totals | {"sampled_entropy_coef": self.loss.sampled_entropy_coef}
        return grpo_loss(logp, batch.pop("advantages"), self.obj, **batch)

    def _reference_logp(self, groups, rows, store: FeatureStore) -> Iterator[Tensor | None]:
        """For each row (N,) reference log-probs where the groups bring none."""
        if self.obj.beta == 0.0 or groups[0].ref_logp is not None:
            yield from (None for _ in rows)
            return
        temperature = self.obj.temperature
        if self.reference is None:
            own = store if self._shares_tower(groups) else feature_store(rows, detach=False)
            for row in rows:
                with torch.no_grad(), self.adapter.peft.disable_adapter():
                    (logp,) = score_row(self.adapter, row, temperature, ("logp",), own)
                yield logp
            return
        backend = self.reference.prepare(self.backend)
        if self.self_check:
            run_self_check(self.reference, groups, backend, score_row)
        own = feature_store(rows, detach=False)
        for row in rows:
            with torch.no_grad():
                (logp,) = score_row(self.reference, row, temperature, ("logp",), own)
            yield logp.to(self.adapter.device)

    def _shares_tower(self, groups) -> bool:
        """Whether the reference pass sees the same image features as the policy pass."""
        needs = self.obj.beta != 0.0 and groups[0].ref_logp is None
        return needs and self.reference is None and self.adapter.features_are_constant()

    def _pack(self, adapter, groups, backend, skip) -> list[PackedRow]:
        rows = pack(
            adapter,
            groups,
            backend,
            max_tokens=self.max_tokens,
            placeholders=self.placeholders,
            skip=set(skip),
        )
        if self.obj.top_entropy_quantile < 1.0 and len(rows) > 1:
            raise InputError(
                f"top_entropy_quantile={self.obj.top_entropy_quantile} ranks the tokens of the "
                f"whole step, which takes {len(rows)} rows; raise max_tokens"
            )
        return rows

    def _sequences(self, groups, members: Sequence[Member], mask: Tensor) -> dict[str, Tensor]:
        """The loss's inputs for some completions, on the model's device."""
        mask = mask.to(self.adapter.device)
        return self.loss.inputs(groups, members, mask, loss_dtype(self.adapter))

    def _masks(self, groups, members: Sequence[Member]) -> Tensor:
        neutral = neutral_id(self.adapter, self.placeholders)
        targets = [fed_and_target(self.adapter, groups[g], c, neutral)[1] for g, c in members]
        return torch.cat([*targets, torch.zeros(0, dtype=torch.int64)]) != IGNORE

    def _without_gradient(self, groups) -> list[Member]:
        """Completions whose gradient is exactly zero and whose metrics need no forward either."""
        obj = self.obj
        if not self.loss.vanishes_with_advantage or obj.top_entropy_quantile < 1.0:
            return []
        if obj.loss.metric_per_sequence:
            return []  # a mean over every sequence
        if groups[0].rollout_logp is not None and groups[0].old_logp is None:
            return []  # the rollout metrics compare with log-probs only the forward gives
        return [
            (g, c)
            for g, group in enumerate(groups)
            for c, length in enumerate(group.lengths)
            if length and not bool(group.token_advantages(c).any())
        ]

    def _metrics(self, results: list[GRPOLoss], groups, idle, weight: float) -> dict[str, float]:
        if not results:
            return {"loss": 0.0}
        metrics = merge_metrics(results)
        if idle and groups[0].old_logp is not None:
            metrics = {k: v for k, v in metrics.items() if k not in ("ratio/min", "ratio/max")}
        loss = weight * sum(result.loss.detach() for result in results)
        return {"loss": float(loss)} | {name: float(value) for name, value in metrics.items()}

    def _check(self, groups: list[Group]) -> None:
        if not groups:
            raise InputError("groups is empty; a step needs at least one group")
        for g, group in enumerate(groups):
            if group.advantages is None:
                raise InputError(f"groups[{g}] ({group.name}): advantages is missing")
            group.check_finite()
        for name in self.loss.kl_streams:
            for g, group in enumerate(groups):
                if name not in group.streams:
                    raise InputError(f"groups[{g}] ({group.name}): streams has no {name!r}")
        for name in OPTIONAL:
            given = [getattr(group, name) is not None for group in groups]
            if any(given) and not all(given):
                raise InputError(
                    f"{name} is given in {sum(given)} of {len(groups)} groups, missing in "
                    f"groups[{given.index(False)}]; give it in all or in none"
                )
        without = self.reference is None and self.adapter.peft is None
        if self.obj.beta != 0.0 and groups[0].ref_logp is None and without:
            raise InputError(
                f"beta is {self.obj.beta}: the groups need ref_logp, or GRPOStep a ref_model, or "
                f"the model PEFT adapters to switch off"
            )
