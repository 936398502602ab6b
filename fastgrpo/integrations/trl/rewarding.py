# SPDX-License-Identifier: Apache-2.0
"""From completions to advantages: rewards that cannot end a run, work ahead, and keep state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastgrpo.advantages import paired_gate
from fastgrpo.advantages.rule import AdvantageRule
from fastgrpo.integrations.trl.first_batches import FirstBatches
from fastgrpo.integrations.trl.guard import INFINITE, RewardGuard
from fastgrpo.integrations.trl.reward_state import load_state_from, save_state_into
from fastgrpo.ops.group_advantages import group_advantages

logger = logging.getLogger(__name__)

QUARANTINE_COLUMN = "quarantine_reason"


class RewardMixin:
    """Guarded rewards, exact zeros, an `AdvantageRule`, and what rewards keep in checkpoints.

    A reward function with a `prefetch` method is started right after generation, so that a judge
    works while log-probs are computed; one with `bind` gets the trainer once; what its
    `state_dict` returns travels in the trainer's checkpoints.
    """

    _unguarded: Sequence[Callable] = ()

    def _install_rewards(self, rule: AdvantageRule | None) -> None:
        self.rule = rule
        self._unguarded = list(self.reward_funcs)
        self._rewards: Tensor | None = None
        self._frames: list[dict] | None = None
        self._batch_rows: list[dict] = []
        self._logged_reasons: set[str] = set()
        self._first = FirstBatches()
        self._guard = RewardGuard(self.fast.reward_timeout)
        if self.fast.guard_rewards:
            self.reward_funcs = [
                f if isinstance(f, nn.Module) else self._guard.wrap(f, name)
                for f, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
            ]
        for function in self._unguarded:
            if hasattr(function, "bind"):
                function.bind(self)

    def _generate(self, prompts: list):
        generated = super()._generate(prompts)
        ahead = [f for f in self._unguarded if hasattr(f, "prefetch")]
        if ahead and len(prompts) == len(self._batch_rows):
            rows = self._batch_rows
            columns = {k: [row[k] for row in rows] for k in rows[0] if k != "prompt"}
            for function in ahead:
                function.prefetch(prompts, generated[3], **columns)
        return generated

    def with_frames(self, inputs: list[dict]) -> list[dict]:
        """The rows with what `frame_columns` tells of them beside their own columns."""
        if not self._frames or len(self._frames) != len(inputs):
            return inputs
        blank = dict.fromkeys(key for row in self._frames for key in row)
        return [blank | frames | row for frames, row in zip(self._frames, inputs, strict=True)]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        inputs = self.with_frames(inputs)
        training = self.fast.guard_rewards and self._mode == "train"
        if training:
            self._first.ask_truth(self._unguarded, inputs, self._group_size, self.state)
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        device, names = rewards.device, self.reward_func_names
        infinite = rewards.isinf()  # from a reward model: functions are guarded one by one
        rewards = rewards.masked_fill(infinite, torch.nan)
        reasons = [example.get(QUARANTINE_COLUMN) for example in inputs]
        broken = torch.tensor([reason is not None for reason in reasons], device=device)
        broken = self.accelerator.gather(broken)
        rewards[broken] = torch.nan
        counts = self._guard.take_counts()
        local = torch.tensor([float(counts[name]) for name in names], device=device)
        failed = self.accelerator.gather(local).view(-1, len(names)).sum(0) + infinite.sum(0)
        failed = dict(zip(names, failed.tolist(), strict=True))
        for name, count in zip(names, infinite.sum(0).tolist(), strict=True):
            if count:
                self._guard.log(name, INFINITE, count)
        self._guard.check_first_call(failed, len(rewards))
        metrics = self._metrics[self._mode]
        for name, value in failed.items():
            metrics[f"fastgrpo/reward_errors/{name}"].append(value)
        metrics["fastgrpo/quarantined"].append(float(broken.sum()))
        for reason in sorted(set(reasons) - {None} - self._logged_reasons):
            self._logged_reasons.add(reason)
            logger.warning("rows set aside while training (%s): no reward, advantage 0", reason)
        if training:
            self._first.watch(rewards, names)
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        self._batch_rows = inputs
        output = super()._generate_and_score_completions(inputs)
        self._exclude_placeholders(output)
        if self.rule is not None:
            self._apply_rule(output)
        elif self.fast.exact_zero_advantages:
            self._zero_equal_groups(output)
        live = (self.accelerator.gather(output["advantages"]) != 0).float().mean().item()
        self._metrics[self._mode]["fastgrpo/frac_nonzero_advantage"].append(live)
        return output

    @property
    def _group_size(self) -> int:
        return self.num_generations if self._mode == "train" else self.num_generations_eval

    def _own_rows(self, values: Tensor, output: dict) -> Tensor:
        """This process's part of a value for every row of all processes."""
        rows = len(output["advantages"])
        first = self.accelerator.process_index * rows
        return values[first : first + rows].to(output["advantages"].device)

    def _total_rewards(self) -> Tensor:
        """(rows of all processes,) weighted sums, NaN where no function scored the row.

        Summed in float64 and rounded once, so that equal rewards have equal sums.
        """
        rewards = self._rewards.double()
        total = (rewards * self.reward_weights.to(rewards)).nansum(1).float()
        return total.masked_fill(rewards.isnan().all(1), torch.nan)

    def _zero_equal_groups(self, output: dict) -> None:
        """Exactly 0 for every row of a group whose advantages are all 0 without rounding."""
        if self.multi_objective_aggregation != "sum_then_normalize":
            return
        size = self._group_size
        exact = group_advantages(self._total_rewards(), size, scale_rewards="none")
        equal = (exact.view(-1, size) == 0).all(1).repeat_interleave(size)
        own = self._own_rows(equal, output)
        output["advantages"] = output["advantages"].masked_fill(own, 0.0)
        self._log_advantages(dict.fromkeys(equal.nonzero()[:, 0].tolist(), 0.0), len(equal))

    def _log_advantages(self, changed: dict[int, float], num_rows: int) -> None:
        """Correct TRL's table of completions, whose last `num_rows` rows are this batch's."""
        logged = self._logs["advantages"]
        offset = len(logged) - num_rows
        for row, value in changed.items():
            if offset + row >= 0:
                logged[offset + row] = value

    def _apply_rule(self, output: dict) -> None:
        """Replace TRL's advantages (the same on every process) and drop filtered groups."""
        size = self._group_size
        sizes = [size] * (len(self._rewards) // size)
        advantages, kept = self.rule(
            self._rewards.double(), self.reward_func_names, sizes, self.reward_weights.tolist()
        )
        if self.rule.gate_column is not None:
            advantages = self._gated(advantages)
        output["advantages"] = self._own_rows(advantages, output).to(output["advantages"].dtype)
        self._log_advantages(dict(enumerate(advantages.tolist())), len(advantages))
        self._metrics[self._mode]["fastgrpo/kept_groups"].append(kept.float().mean().item())
        if not kept.all():
            dropped = self._own_rows((~kept).repeat_interleave(size), output)
            self._leave_out(output, dropped[:, None].expand_as(output["completion_mask"]))

    def _gated(self, advantages: Tensor) -> Tensor:
        columns = [(r["question_id"], r[self.rule.gate_column]) for r in self._batch_rows]
        questions, is_gate = zip(*gather_object(columns), strict=True)
        return paired_gate(
            advantages,
            self._total_rewards(),
            questions,
            [bool(g) for g in is_gate],
            ceiling=self.rule.gate_ceiling,
            gate_weight=self.rule.gate_weight,
        )

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial), name)
        save_state_into(folder, *self._reward_owners)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state_from(checkpoint, *self._reward_owners)

    @property
    def _reward_owners(self) -> tuple[list[str], list[Callable], int]:
        return self.reward_func_names, self._unguarded, self.accelerator.process_index
