"""TRL's GRPOTrainer with packed groups: the same numbers, each prompt and its images once."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict
from trl.trainer.utils import unsplit_pixel_values_by_grid as unsplit_pixel_values

from fastgrpo.engine import score
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl.guard import RewardGuard
from fastgrpo.integrations.trl.rollout import sample_rows
from fastgrpo.integrations.trl.rows import (
    anchor_group,
    as_groups,
    plan_micro_batches,
    read_rows,
    scatter,
    scorable,
    without_gradient,
)
from fastgrpo.integrations.trl.selfcheck import check_against_trl
from fastgrpo.integrations.trl.support import check_trainer, check_version
from fastgrpo.integrations.trl.weights import apply_liger_layers, load_renamed
from fastgrpo.packing import Group

logger = logging.getLogger(__name__)

QUARANTINE_COLUMN = "quarantine_reason"
ONE_ROW = 2**40


@dataclass(frozen=True)
class FastOptions:
    """How the trainer is accelerated; the numbers of the step do not depend on it.

    `max_tokens`: the longest packed row (None: the engine's default). `backend`: the attention
    implementation (None: the best for the device). `self_check`: compare the first micro-batch of
    each model with TRL's own values and raise on a mismatch. `keep_groups`: shuffle whole groups
    instead of rows between micro-batches, so that a group stays together. `guard_rewards`,
    `reward_timeout` (seconds per call): see `RewardGuard`. `exact_zero_advantages`: a group whose
    rewards are all equal gets advantages of exactly 0, where TRL leaves the rounding residue of
    mean and standard deviation (6e-4 for eight rewards of 0.9, 0.85 for eight of 10000.1).
    `skip_zero_gradient`: no backward for groups whose advantages are all 0, where nothing else in
    TRL's loss (KL, entropy bonus) gives them a gradient.
    `packed_rollout`: sample with `fastgrpo.generate`, each prompt and image prefilled once per
    group, instead of `model.generate`: the same distribution, other random numbers.
    `liger_kernels`: liger-kernel's RMSNorm, rotary and SwiGLU layers (never its loss), CUDA only.
    """

    max_tokens: int | None = None
    backend: str | None = None
    self_check: bool = True
    keep_groups: bool = True
    guard_rewards: bool = True
    reward_timeout: float | None = None
    exact_zero_advantages: bool = True
    skip_zero_gradient: bool = True
    packed_rollout: bool = False
    liger_kernels: bool = False


class _FastMixin:
    """The methods that replace TRL's; see `accelerate`."""

    def _install(self, options: FastOptions) -> None:
        check_trainer(self, _FastMixin)
        if self.accelerator.num_processes > 1 and options.max_tokens is not None:
            raise InputError(
                "max_tokens: with several processes a micro-batch is one packed row (DDP expects "
                "one forward per backward); set per_device_train_batch_size instead"
            )
        self.fast = options
        self._checked_models: set[int] = set()
        self._rewards: Tensor | None = None
        self._grids: list | None = None
        self._weightless: list[bool] | None = None
        self._logged_reasons: set[str] = set()
        self._guard = RewardGuard(options.reward_timeout)
        if options.guard_rewards:
            self.reward_funcs = [
                f if isinstance(f, nn.Module) else self._guard.wrap(f, name)
                for f, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
            ]
        config = self.accelerator.unwrap_model(self.model).config
        ids = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
        self._placeholder_ids = tuple(i for i in ids if i is not None)
        if options.liger_kernels:
            apply_liger_layers(self)
        if self.args.ddp_broadcast_buffers is None:
            # Passes without gradient may differ between processes; DDP would wait in each.
            self.args.ddp_broadcast_buffers = False

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        pixel_values=None,
        image_grid_thw=None,
        num_images=None,
        mm_token_type_ids=None,
        **foreign,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's per-token values from packed groups; (B, C), exactly 0 where nothing counts."""
        for name, value in foreign.items():
            if value is not None:
                raise InputError(
                    f"{name}: images of {type(model).__name__} cannot be packed; the supported "
                    "families are Qwen2-VL, Qwen2.5-VL, Qwen3-VL and text models"
                )
        if compute_aux_loss:
            raise InputError("router_aux_loss_coef: refused, see fastgrpo.integrations.trl")
        rows = read_rows(
            input_ids,
            attention_mask,
            logits_to_keep,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            num_images=num_images,
            mm_token_type_ids=mm_token_type_ids,
        )
        members, idle = scorable(rows), []
        if torch.is_grad_enabled() and self._weightless is not None:
            idle = without_gradient(rows, members, self._weightless)
            members = [row for row in members if row not in set(idle)]
        outputs = ("logp", "entropy") if compute_entropy else ("logp",)
        # Several processes: `score` is a collective, so each one calls it once, whatever it holds.
        anchored = torch.is_grad_enabled() or self.accelerator.num_processes > 1
        anchor = anchor_group(rows, members) if anchored else []
        scores = self._score(model, as_groups(rows, members) + anchor, outputs)
        scores, extra = scores[: len(members)], scores[len(members) :]
        with torch.no_grad():
            scores += self._score(model, as_groups(rows, idle), outputs)
        members = members + idle
        logps = scatter([s.logp[0] for s in scores], members, rows)
        for group in extra:
            logps = logps + 0.0 * group.logp[0].sum()
        entropies = None
        if compute_entropy:
            entropies = scatter([s.entropy[0] for s in scores], members, rows)
        if self.fast.self_check and id(model) not in self._checked_models:
            self._self_check(
                model, rows, members, logps, input_ids, attention_mask, mm_token_type_ids
            )
        return logps, entropies, None

    def _score(self, model: nn.Module, groups: list[Group], outputs: tuple[str, ...]) -> list:
        if not groups:
            return []
        max_tokens = self.fast.max_tokens
        if self.accelerator.num_processes > 1:
            # DDP expects one forward per backward; passes without gradient go around it.
            if torch.is_grad_enabled():
                max_tokens = ONE_ROW
            else:
                model = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            return score(
                model,
                groups,
                temperature=self.temperature,
                outputs=outputs,
                max_tokens=max_tokens,
                backend=self.fast.backend,
                self_check=False,  # check_against_trl compares more rows, with TRL's own values
                placeholders="neutralize",
            )

    def _compute_loss(self, model, inputs):
        self._weightless = None
        if self._advantages_are_the_only_weights():
            advantages = inputs["advantages"]
            self._weightless = (advantages.view(len(advantages), -1) == 0).all(1).tolist()
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._weightless = None

    def _advantages_are_the_only_weights(self) -> bool:
        """Whether a sequence of advantage 0 has a gradient of 0: TRL's own loss, nothing added."""
        losses = [cls for cls in type(self).__mro__ if "_compute_loss" in vars(cls)]
        return (
            self.fast.skip_zero_gradient
            and self.accelerator.num_processes == 1  # `score` is a collective
            and losses[:2] == [_FastMixin, GRPOTrainer]
            and "_compute_loss" not in vars(self)
            and self.beta == 0.0
            and not self._entropy_bonus_enabled
        )

    def _self_check(self, model, rows, members, logps, input_ids, attention_mask, types) -> None:
        clean = [row for row in members if not self._is_placeholder(rows.completions[row]).any()]
        if not clean:
            return
        dtype = next(model.parameters()).dtype
        error = check_against_trl(
            super()._get_per_token_logps_and_entropies,
            model,
            rows,
            clean,
            logps,
            dict(input_ids=input_ids, attention_mask=attention_mask, mm_token_type_ids=types),
            half_precision=dtype.itemsize < 4 or self.accelerator.mixed_precision != "no",
        )
        self._checked_models.add(id(model))
        self._metrics[self._mode]["fastgrpo/self_check_max_abs"].append(error)

    def _is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, ids.new_tensor(self._placeholder_ids))

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        self._grids = _grids_per_row(fields.get("image_grid_thw"), images)
        if images is not None and not self.use_vllm:
            # Processors take [] for a prompt without images; TRL's None ends in a TypeError.
            images = [row or [] for row in images]
        return prompt_ids, images, fields

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ):
        if not self.fast.packed_rollout:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        if self.use_vllm or self.use_transformers_continuous_batching or has_tool_images:
            raise InputError(
                "packed_rollout: samples in this process from prompts; turn off vLLM, continuous "
                "batching and tools that return images"
            )
        with profiling_context(self, "transformers.generate"), self.accelerator.autocast():
            completion_ids = sample_rows(
                self.accelerator.unwrap_model(self.model),
                prompt_ids,
                multimodal_fields,
                None if images is None else [len(row or ()) for row in images],
                self.generation_config,
                self.eos_token_ids,
                max_tokens=self.fast.max_tokens,
                backend=self.fast.backend,
            )
        return completion_ids, None

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _prepare_inputs(self, generation_batch):
        if self._mode == "eval" or not self.fast.keep_groups:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = _take_rows(split_pixel_values_by_grid(batch), self._row_order(batch))
            self._buffered_inputs = [
                unsplit_pixel_values(chunk) for chunk in split_tensor_dict(batch, steps)
            ]
        return self._buffered_inputs[self._step % steps]

    def _row_order(self, batch: dict) -> list[int]:
        num_rows = len(batch["completion_ids"])
        first = self.accelerator.process_index * num_rows  # a group may straddle two processes
        group_of_row = [(first + row) // self.num_generations for row in range(num_rows)]
        # One draw of TRL's size: sampling after it sees the random numbers it would see in TRL.
        order = torch.randperm(num_rows).tolist()
        return plan_micro_batches(group_of_row, order, self.args.steps_per_generation)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not load_renamed(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not load_renamed(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._grids is not None and len(self._grids) == len(inputs):
            # The resolution the model saw, for rewards that compare pixels; VLM-R1's column.
            inputs = [
                {"image_grid_thw": grid} | row
                for grid, row in zip(self._grids, inputs, strict=True)
            ]
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
        metrics = self._metrics[self._mode]
        for name, value in zip(names, failed.tolist(), strict=True):
            metrics[f"fastgrpo/reward_errors/{name}"].append(value)
        metrics["fastgrpo/quarantined"].append(float(broken.sum()))
        for reason in sorted(set(reasons) - {None} - self._logged_reasons):
            self._logged_reasons.add(reason)
            logger.warning("rows set aside while training (%s): no reward, advantage 0", reason)
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self._exclude_placeholders(output)
        if self.fast.exact_zero_advantages:
            self._zero_equal_groups(output)
        live = (self.accelerator.gather(output["advantages"]) != 0).float().mean().item()
        self._metrics[self._mode]["fastgrpo/frac_nonzero_advantage"].append(live)
        return output

    def _exclude_placeholders(self, output: dict) -> None:
        """Image and video placeholders the policy sampled: no loss, counted."""
        if not self._placeholder_ids:
            return
        sampled = self._is_placeholder(output["completion_ids"])
        tool_mask = output.get("tool_mask", torch.ones_like(output["completion_mask"]))
        sampled &= (output["completion_mask"] * tool_mask).bool()
        count = self.accelerator.gather(sampled.sum()).sum()
        self._metrics[self._mode]["fastgrpo/sampled_placeholders"].append(float(count))
        if sampled.any():
            output["tool_mask"] = tool_mask.masked_fill(sampled, 0)
        output["num_items_in_batch"] = output["num_items_in_batch"] - count

    def _zero_equal_groups(self, output: dict) -> None:
        if self.multi_objective_aggregation != "sum_then_normalize":
            return
        size = self.num_generations if self._mode == "train" else self.num_generations_eval
        weights = self.reward_weights.to(self._rewards.device)
        total = (self._rewards * weights).nansum(1)
        unscored = self._rewards.isnan().all(1)
        low = total.masked_fill(unscored, torch.inf).view(-1, size).amin(1)
        high = total.masked_fill(unscored, -torch.inf).view(-1, size).amax(1)
        rounding = 4 * torch.finfo(total.dtype).eps * torch.maximum(low.abs(), high.abs())
        equal = (high - low <= rounding).repeat_interleave(size)
        advantages, logged = output["advantages"], self._logs["advantages"]
        first = self.accelerator.process_index * len(advantages)
        output["advantages"] = advantages.masked_fill(equal[first : first + len(advantages)], 0.0)
        offset = len(logged) - len(equal)
        for row in equal.nonzero()[:, 0].tolist():
            if offset + row >= 0:
                logged[offset + row] = 0.0


class FastGRPOTrainer(_FastMixin, GRPOTrainer):
    """TRL's GRPOTrainer, accelerated: same constructor, and `fast=FastOptions(...)` or a dict."""

    _tag_names = [*GRPOTrainer._tag_names, "fastgrpo"]

    def __init__(self, *args, fast: FastOptions | dict | None = None, **kwargs):
        check_version()
        options = fast if isinstance(fast, FastOptions) else _options(fast or {})
        super().__init__(*args, **kwargs)
        self._install(options)


def accelerate(trainer: GRPOTrainer, **options) -> GRPOTrainer:
    """Makes any TRL GRPOTrainer instance compute its log-probabilities from packed groups.

    The instance keeps its class's own methods; loss, masks, metrics, callbacks, logging and
    checkpoints stay TRL's. Options are the fields of `FastOptions`. Returns the trainer. Raises
    `InputError`, with the reason, for another trl version, a trainer or a model something else has
    patched, and options a packed row cannot express.
    """
    chosen = _options(options)
    if isinstance(trainer, _FastMixin):
        raise InputError(f"{type(trainer).__name__} is accelerated already")
    check_trainer(trainer, _FastMixin)  # before the instance is touched
    cls = type(trainer)
    fast = (
        FastGRPOTrainer
        if cls is GRPOTrainer
        else type(f"Fast{cls.__name__}", (_FastMixin, cls), {})
    )
    trainer.__class__ = fast
    trainer._install(chosen)
    return trainer


def _options(values: dict) -> FastOptions:
    known = [field.name for field in fields(FastOptions)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; the options are {', '.join(known)}")
    return FastOptions(**values)


def _grids_per_row(grids, images: list | None) -> list | None:
    """Each row's (t, h, w) in patches as [[t, h, w]]; None for a row without exactly one image."""
    if grids is None or images is None:
        return None
    remaining = iter(torch.as_tensor(grids).tolist())
    rows = [[next(remaining) for _ in row or []] for row in images]
    return [row if len(row) == 1 else None for row in rows]


def _take_rows(batch: dict, order: list[int]) -> dict:
    """The batch with its rows in `order`; scalars and absent fields as they are."""

    def take(value):
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[order] if isinstance(value, Tensor) else [value[row] for row in order]

    return {key: take(value) for key, value in batch.items()}
