# SPDX-License-Identifier: Apache-2.0
"""TRL's loss with the projection fused in: three matmuls, inside the model's forward.

Letters: B rows, C completion columns.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.engine.balance import RouterBalance
from fastgrpo.engine.loss import OPTIONAL as LOSS_FIELDS
from fastgrpo.engine.loss import RowLoss, StepLoss, loss_of_groups
from fastgrpo.engine.self_check import SelfCheckError
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl.batches import loss_mask
from fastgrpo.integrations.trl.perception import (
    PERTURBED,
    TOKEN_WEIGHTS,
    perception_terms,
    perturbed_entropy,
)
from fastgrpo.integrations.trl.rows import (
    IMAGE_FIELDS,
    TYPE_FIELDS,
    LossTables,
    Rows,
    anchor_row,
    read_rows,
    scatter,
    scorable,
    without_gradient,
)
from fastgrpo.losses.metrics import combined_stats, merge_stats
from fastgrpo.models.adapter import Adapter
from fastgrpo.objective import Objective
from fastgrpo.ops.grpo_loss import GRPOLoss, grpo_loss

TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# Methods of TRL's trainer that decide the loss: whoever has their own of one keeps TRL's loss.
LOSS_METHODS = (
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
    "get_high_entropy_mask",
    "get_off_policy_mask",
    "get_gamma_weights",
)
_LOSS_TOLERANCE = 1e-3


class LossMixin:
    """`_compute_loss` on the engine's fused loss; TRL's own code still logs and keeps its state."""

    def _install_loss(self) -> None:
        # Log-probs, entropies and load-balancing loss that TRL's loss is to log.
        self._given: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._loss_checked = False
        own = self._own_loss_because()
        theirs = next((name for name in LOSS_METHODS if self._changed(name)), None)
        if own is None:
            self._per_token = (
                theirs is not None or self.top_entropy_quantile < 1.0 or not self._expressible()
            )
            return
        if theirs is not None:
            raise InputError(
                f"{own} is not in TRL's loss, and {type(self).__name__} has its own {theirs}, "
                "which would not see it"
            )
        if self.use_adaptive_entropy:
            raise InputError(f"use_adaptive_entropy: TRL's controller does not know {own}")
        if self.top_entropy_quantile < 1.0 and self.accelerator.num_processes > 1:
            raise InputError(f"top_entropy_quantile: over several processes not with {own}")
        if self._padded_reason:
            raise InputError(f"{own} needs packed rows: {self._padded_reason}")
        self._per_token = False
        self._objective(0.0)  # refuses what it cannot express

    def _expressible(self) -> bool:
        """Whether TRL's settings are an `Objective`: TRL ignores a `delta` that does not apply."""
        try:
            self._objective(0.0)
        except InputError:
            return False
        return True

    def _own_loss_because(self) -> str | None:
        """What makes the loss another than TRL's own, if anything."""
        if self.loss_type not in TRL_LOSSES:
            return f"loss_type={self.loss_type!r}"
        perception = self.perception
        if perception is not None and (perception.has_loss_terms or perception.token_share):
            return "perception"
        return None

    def _changed(self, name: str) -> bool:
        """Whether a class that is neither TRL's nor ours, or this instance, has its own `name`."""
        classes = [cls for cls in type(self).__mro__ if name in vars(cls)]
        known = ("fastgrpo.integrations.trl.", "trl.trainer.")
        return name in vars(self) or not all(c.__module__.startswith(known) for c in classes)

    def _compute_loss(self, model, inputs):
        reason, own = self._unserved(inputs), self._own_loss_because()
        if reason and own:
            raise InputError(f"{own} needs packed rows: {reason}")
        if reason:
            return super()._compute_loss(model, inputs)
        self._check_images(inputs)
        if self._per_token:
            self._weightless = None
            if self._advantages_are_the_only_weights(inputs):
                advantages = inputs["advantages"]
                self._weightless = (advantages.view(len(advantages), -1) == 0).all(1).tolist()
            try:
                return super()._compute_loss(model, inputs)
            finally:
                self._weightless = None
        return self._fused_loss(model, inputs)

    def _advantages_are_the_only_weights(self, inputs: dict) -> bool:
        """Whether rows of advantage 0 may be scored without gradient: nothing else gives one."""
        return (
            self.fast.skip_zero_gradient
            and self.accelerator.num_processes == 1  # a forward with gradient is a collective
            and not self._changed("_compute_loss")
            and not self.aux_loss_enabled
            and self._row_loss(inputs).vanishes_with_advantage
        )

    def _fused_loss(self, model, inputs) -> Tensor:
        given = {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            **{name: inputs.get(name) for name in TYPE_FIELDS},
        }
        rows = read_rows(
            **given,
            num_columns=inputs["completion_ids"].shape[1],
            family=Adapter(model).family,
            fields={name: inputs.get(name) for name in IMAGE_FIELDS},
            num_images=inputs.get("num_images"),
        )
        tables = LossTables(inputs["advantages"], loss_mask(inputs), self._optional_columns(inputs))
        totals = self._denominators(inputs, tables)
        loss = self._row_loss(inputs, self._entropy_coef(totals, tables))
        members, idle = scorable(rows), []
        if torch.is_grad_enabled() and self._advantages_are_the_only_weights(inputs):
            idle = without_gradient(rows, members, tables.weightless())
        balance = self._router_balance(model, rows) if self.aux_loss_enabled else None
        live, idle = self._rows_to_run(rows, members, idle, balance)
        step = self._loss_of(loss, model, tables.groups(rows, live), totals, balance)
        with torch.no_grad():
            rest = self._loss_of(loss, model, tables.groups(rows, idle), totals)
        total, aux = step.loss, None
        if balance:
            aux = balance.loss()
            total = total + self.router_aux_loss_coef * aux / self._accumulation
        scores, scored = step.scores + rest.scores, live + idle
        logps = scatter([s.logp[0] for s in scores], scored, rows)
        entropies = scatter([s.entropy[0] for s in scores], scored, rows)
        if self.fast.self_check:
            self._self_check(model, rows, members, logps, given, loss_mask(inputs))
        if self._own_loss_because() is None:
            self._log_as_trl(model, inputs, (logps, entropies, aux), total)
            return total
        missing = len(rows.prompts) - len(scored)
        results = [*step.results, *rest.results, self._unscored(loss, tables, missing, totals)]
        self._log_own(results, totals, aux)
        return total + self._constant(loss, inputs, totals)

    def _anchored(self) -> bool:
        """Whether a forward must run whatever there is to score (see `anchor_row`)."""
        return torch.is_grad_enabled() or self.accelerator.num_processes > 1

    def _router_balance(self, model, rows: Rows) -> RouterBalance:
        """Collects the load-balancing loss of all rows, which are then the groups that run."""
        empty = {(row, 0) for row, ids in enumerate(rows.completions) if not ids.numel()}
        return RouterBalance(Adapter(model), uncounted=empty)

    def _rows_to_run(
        self, rows: Rows, members: list[int], idle: list[int], balance: RouterBalance | None
    ) -> tuple[list[int], list[int]]:
        """With gradient, and without (`idle`). Routers are balanced over every prompt."""
        if balance is not None:
            return list(range(len(rows.prompts))), []
        return anchor_row(rows, members, idle, needed=self._anchored())

    def _loss_of(
        self,
        loss: RowLoss,
        model,
        groups: list,
        totals: dict,
        balance: RouterBalance | None = None,
    ) -> StepLoss:
        if not torch.is_grad_enabled():  # DDP would wait for a backward
            model = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            return loss_of_groups(
                loss,
                Adapter(model),
                groups,
                max_tokens=self.fast.max_tokens,
                backend=self.fast.backend,
                placeholders="neutralize",
                balance=balance,
                features=self._kept_features(model),
                prompts=self._prompts,
                **totals,
            )

    def _row_loss(self, inputs: dict, entropy_coef: float | None = None) -> RowLoss:
        coef = self.entropy_coef if entropy_coef is None else entropy_coef
        loss = RowLoss(
            self._objective(coef if self._entropy_bonus_enabled else 0.0),
            with_entropy=True,
            workspace_mb=self.fast.workspace_mb,
            keep_activations=self.fast.keep_activations,
        )
        if PERTURBED not in inputs:
            return loss
        terms = perception_terms(self.perception, *self._progress)
        return dataclasses.replace(
            loss, kl_streams=terms.streams, sampled_entropy_coef=terms.entropy_coef
        )

    def _objective(self, entropy_coef: float) -> Objective:
        """TRL's arguments, with the values its trainer holds where it reads them from itself."""
        held = (
            "loss_type",
            "importance_sampling_level",
            "epsilon_high",
            "beta",
            "temperature",
            "top_entropy_quantile",
            "off_policy_mask_threshold",
            "max_completion_length",
            "use_vllm",
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
        )
        values = vars(self.args) | {name: getattr(self, name) for name in held}
        values |= {"epsilon": self.epsilon_low, "entropy_coef": entropy_coef}
        values["use_adaptive_entropy"] = False  # the coefficient is that of this step
        return Objective.from_trl(types.SimpleNamespace(**values))

    def _optional_columns(self, inputs: dict) -> dict[str, Tensor]:
        """(B, C) tables of the batch by the names of `Group`'s fields and streams."""
        names = {"old_per_token_logps": "old_logp", TOKEN_WEIGHTS: "token_weights"}
        if self.beta != 0.0:
            names["ref_per_token_logps"] = "ref_logp"
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        if corrected or self.off_policy_mask_threshold is not None:
            names["sampling_per_token_logps"] = "rollout_logp"
        if PERTURBED in inputs:
            names[PERTURBED] = "perturbed"
        return {ours: inputs[theirs] for theirs, ours in names.items() if theirs in inputs}

    @property
    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self._mode == "train" else 1.0

    def _denominators(self, inputs: dict, tables: LossTables) -> dict:
        """TRL's, such that the micro-batches of a step, and the mean over processes, add up."""
        num_tokens = tables.num_tokens * self._accumulation
        if self._counts_the_whole_step:
            num_tokens = inputs["num_items_in_batch"].clamp(min=1.0)
            num_tokens = num_tokens / self.accelerator.num_processes
            if self._mode == "train":  # it spans the generation batch
                num_tokens = num_tokens * self._accumulation / self.args.steps_per_generation
        return {"num_tokens": num_tokens, "num_sequences": tables.num_rows * self._accumulation}

    @property
    def _counts_the_whole_step(self) -> bool:
        return self.loss_type != "bnpo" and self._objective(0.0).aggregator == "token-mean"

    def _entropy_coef(self, totals: dict, tables: LossTables) -> float:
        """TRL's bonus is a mean over the micro-batch, the objective's over `num_tokens`."""
        coef = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coef = 0.0
        if not self._entropy_bonus_enabled or coef == 0.0:
            return 0.0
        own = max(tables.num_tokens, 1) * self._accumulation
        return coef * max(float(totals["num_tokens"]), 1.0) / own

    def _log_as_trl(
        self, model, inputs, values: tuple[Tensor, Tensor, Tensor | None], loss: Tensor
    ) -> None:
        """TRL's own loss on the values just made: its metrics, its entropy controller."""
        logps, *rest = values
        known = inputs.get("old_per_token_logps", inputs.get("ref_per_token_logps"))
        if known is not None:  # ratios of tokens that do not count must not overflow
            logps = torch.where(loss_mask(inputs).bool(), logps, known)
        self._given = logps, *rest
        try:
            with torch.no_grad():
                expected = super()._compute_loss(model, inputs)
        finally:
            self._given = None
        if not self.fast.self_check or self._loss_checked:
            return
        self._loss_checked = True
        ours, theirs = float(loss.detach()), float(expected)
        if not abs(ours - theirs) <= _LOSS_TOLERANCE * max(1.0, abs(theirs)):
            raise SelfCheckError(
                f"the fused loss of the first micro-batch is {ours:.6g}, TRL's on the same "
                f"log-probabilities {theirs:.6g} (loss_type={self.loss_type!r}). Nothing was "
                "trained. Please report these settings; self_check=False skips the check."
            )

    def _log_own(self, results: Sequence[GRPOLoss], totals: dict, aux: Tensor | None) -> None:
        """TRL's metrics of a loss that is not TRL's, over all processes."""
        names = list(results[0].stat_names)
        # One table a process, whatever number of rows it had: a gather wants equal shapes.
        own = combined_stats(names, [result.stats for result in results])
        stats = self.accelerator.gather(own[None])
        merged = {name: float(x) for name, x in merge_stats(names, list(stats)).items()}
        metrics = self._metrics[self._mode]
        for name, value in merged.items():
            if name in ("kl", "entropy", "cispo_clip_ratio") or name.startswith(("clip", "vespo")):
                metrics[name].append(value)
        if self._entropy_bonus_enabled:
            policy = merged["policy_loss"] / self.accelerator.num_processes
            per_batch = 1.0 if self._counts_the_whole_step else self._accumulation
            metrics["policy_loss"].append(policy * per_batch)
            if self._mode == "train" and self.accelerator.sync_gradients:
                metrics["entropy_coef"].append(self.entropy_coef)
        if aux is not None:
            metrics["aux_loss"].append(self.accelerator.gather(aux.detach()).mean().item())
        if "kl_terms/0" in merged:
            metrics["fastgrpo/perception_kl"].append(merged["kl_terms/0"])
            coefficient = self.perception.kl_coef(*self._progress)
            metrics["fastgrpo/perception_kl_coef"].append(coefficient)

    def _unscored(self, loss: RowLoss, tables: LossTables, num_rows: int, totals: dict) -> GRPOLoss:
        """The part of rows without a token: sequences that metrics of sequences count."""
        empty = torch.zeros(0, device=self.accelerator.device)
        return grpo_loss(
            empty,
            torch.zeros(num_rows, device=self.accelerator.device),
            loss.obj,
            seq_ids=empty.long(),
            entropy=empty,
            kl_terms=[stream.term(empty) for stream in loss.kl_streams.values()],
            **dict.fromkeys((n for n in tables.columns if n in LOSS_FIELDS), empty),
            **totals,
        )

    def _constant(self, loss: RowLoss, inputs: dict, totals: dict) -> Tensor | float:
        """What moves the loss and not the gradient."""
        if PERTURBED not in inputs:
            return 0.0
        mask = loss_mask(inputs).bool()
        terms = perception_terms(self.perception, *self._progress)
        packed = inputs[PERTURBED][mask].float(), mask.nonzero()[:, 0]
        return perturbed_entropy(terms, loss.obj, *packed, len(mask), totals)
