# SPDX-License-Identifier: Apache-2.0
"""TRL's GRPOTrainer with packed groups: the same numbers, each prompt and its images once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from fastgrpo.advantages.perception_rule import PerceptionRule
from fastgrpo.advantages.rule import AdvantageRule
from fastgrpo.engine import RouterBalance, score
from fastgrpo.engine.self_check import computed_exactly
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl.attention import AttentionMixin
from fastgrpo.integrations.trl.batches import BatchMixin
from fastgrpo.integrations.trl.checkpoints import CheckpointMixin
from fastgrpo.integrations.trl.fallback import FallbackMixin
from fastgrpo.integrations.trl.features import FeatureMixin
from fastgrpo.integrations.trl.gathering import GatheringMixin
from fastgrpo.integrations.trl.interruptions import (
    FiniteStepsMixin,
    OneWriter,
    ReleasingMixin,
    SaveOnTerm,
)
from fastgrpo.integrations.trl.loss import LossMixin
from fastgrpo.integrations.trl.perception import PerceptionMixin
from fastgrpo.integrations.trl.resampling import ResamplingMixin
from fastgrpo.integrations.trl.rewarding import RewardMixin
from fastgrpo.integrations.trl.rollout import RolloutMixin
from fastgrpo.integrations.trl.rows import (
    IMAGE_FIELDS,
    TYPE_FIELDS,
    Rows,
    as_groups,
    read_rows,
    scatter,
    scorable,
    without_gradient,
)
from fastgrpo.integrations.trl.selfcheck import TRLCheck
from fastgrpo.integrations.trl.support import check_trainer, check_version
from fastgrpo.integrations.trl.weights import apply_liger_layers, load_renamed
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing import Group


@dataclass(frozen=True)
class FastOptions:
    """How the trainer is accelerated; the numbers of the step do not depend on it.

    `max_tokens`: the longest packed row (None: the engine's default). `backend`: the attention
    implementation (None: the best for the device). `self_check`: compare the first micro-batch of
    each model with TRL's own values and raise on a mismatch. `keep_groups`: shuffle whole groups
    instead of rows between micro-batches, so that a group stays together; where a generation serves
    several optimizer steps, other rows than TRL's share a step, groups with advantages spread
    evenly over the steps. `guard_rewards`,
    `reward_timeout` (seconds per call): see `RewardGuard`. `exact_zero_advantages`: a group whose
    rewards are all equal gets advantages of exactly 0, where TRL leaves the rounding residue of
    mean and standard deviation (6e-4 for eight rewards of 0.9, 0.85 for eight of 10000.1).
    `skip_zero_gradient`: no backward for groups whose advantages are all 0, where nothing else in
    TRL's loss (KL, entropy bonus) gives them a gradient.
    `packed_rollout`: sample with `fastgrpo.generate`, each prompt and image prefilled once per
    group, instead of `model.generate`: the same distribution, and the same random numbers where a
    batch is whole groups in order. None: wherever it obeys every generation setting, elsewhere
    TRL's own generation and one line with the reason; True raises there, False never uses it.
    `workspace_mb`: memory for a chunk of logits (None: see `linear_grpo_loss`).
    `keep_activations`: under gradient checkpointing recompute only the layers whose activations
    would take more memory than TRL's padded step that recomputes all, or than half of what is free.
    `keep_prompts`: on one process, where a packed rollout is one micro-batch, the first loss goes
    on from what that computed of prompts and images, with gradient; False computes them again.
    `cuda_graphs`: on a GPU, a packed rollout's decoding steps are CUDA graphs, but for weights in
    shards (FSDP2, ZeRO-3); a model whose forward cannot be one is named once with the reason.
    `liger_kernels`: liger-kernel's RMSNorm, rotary and SwiGLU layers (never its loss), CUDA only.
    `max_skipped_steps`: steps in a row whose gradient is not finite before the run ends.
    `strict`: raise where a packed row cannot express the model, an option or a tool's images, which
    TRL's own padded path computes otherwise, with one line that says so.
    `max_generation_batches`: above 1, groups without a gradient are replaced by groups of fresh
    prompts until the batch is full or so many batches were sampled for it (DAPO).
    """

    max_tokens: int | None = None
    backend: str | None = None
    self_check: bool = True
    keep_groups: bool = True
    guard_rewards: bool = True
    reward_timeout: float | None = None
    exact_zero_advantages: bool = True
    skip_zero_gradient: bool = True
    packed_rollout: bool | None = None
    liger_kernels: bool = False
    max_skipped_steps: int = 10
    workspace_mb: float | None = None
    keep_activations: bool = True
    keep_prompts: bool = True
    cuda_graphs: bool = True
    strict: bool = False
    max_generation_batches: int = 1


class _FastMixin(
    CheckpointMixin,
    GatheringMixin,
    ResamplingMixin,
    LossMixin,
    FeatureMixin,
    PerceptionMixin,
    RewardMixin,
    RolloutMixin,
    FallbackMixin,
    BatchMixin,
    AttentionMixin,
    FiniteStepsMixin,
    ReleasingMixin,
):
    """The methods that replace TRL's; see `accelerate`."""

    def _install(
        self,
        options: FastOptions,
        rule: AdvantageRule | None = None,
        perception: PerceptionRule | None = None,
    ) -> None:
        check_trainer(self, _FastMixin, self_check=options.self_check)
        self.fast = options
        self._judge()
        if perception is not None and self._padded_reason:
            raise InputError(f"perception needs packed rows: {self._padded_reason}")
        self._check_resampling()
        self.perception = perception
        self._checked: set[tuple[int, bool]] = set()
        self._weightless: list[bool] | None = None
        config = self.accelerator.unwrap_model(self.model).config
        ids = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
        self._placeholder_ids = tuple(i for i in ids if i is not None and not self._padded_reason)
        if options.liger_kernels:
            apply_liger_layers(self)
        self.add_callback(OneWriter())
        self.add_callback(SaveOnTerm(self.accelerator))
        if self.args.ddp_broadcast_buffers is None:
            # Passes without gradient may differ between processes; DDP would wait in each.
            self.args.ddp_broadcast_buffers = False
        self._install_loss()
        self._install_rewards(rule)

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        num_images=None,
        **fields,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's per-token values from packed groups; (B, C), exactly 0 where nothing counts.

        `fields` are the images' inputs, whichever the model's family has, and what each token is.
        """
        if self._given is not None:
            return self._given
        if self._unserved(fields):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                num_images=num_images,
                **fields,
            )
        self._check_images(fields)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        given |= {name: fields.pop(name, None) for name in TYPE_FIELDS}
        rows = read_rows(
            **given,
            num_columns=logits_to_keep,
            family=Adapter(model).family,
            fields=fields,
            num_images=num_images,
        )
        return self._packed_values(model, rows, given, compute_entropy, compute_aux_loss)

    def _packed_values(
        self,
        model: nn.Module,
        rows: Rows,
        given: dict[str, Tensor | None],
        compute_entropy: bool,
        compute_aux_loss: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The values of `rows`; `given` are the tensors they were read from."""
        members, idle = scorable(rows), []
        if torch.is_grad_enabled() and self._weightless is not None:
            idle = without_gradient(rows, members, self._weightless)
        outputs = ("logp", "entropy") if compute_entropy else ("logp",)
        balance = self._router_balance(model, rows) if compute_aux_loss else None
        live, idle = self._rows_to_run(rows, members, idle, balance)
        scores = self._score(model, as_groups(rows, live), outputs, balance)
        with torch.no_grad():
            scores += self._score(model, as_groups(rows, idle), outputs)
        logps = scatter([s.logp[0] for s in scores], live + idle, rows)
        entropies = None
        if compute_entropy:
            entropies = scatter([s.entropy[0] for s in scores], live + idle, rows)
        if self.fast.self_check:
            counted = given["attention_mask"][:, -rows.num_columns :]
            self._self_check(model, rows, members, logps, given, counted)
        return logps, entropies, balance and balance.loss()

    def _check_images(self, batch: dict) -> None:
        """The images' inputs of a batch (keys are TRL's) are those of the model's family."""
        family = Adapter(self.accelerator.unwrap_model(self.model)).family
        given = [name for name in IMAGE_FIELDS if batch.get(name) is not None]
        known = (*family.vision_inputs, *family.count_inputs)
        foreign = [name for name in given if name not in known]
        if foreign:
            raise InputError(
                f"{foreign[0]}: images of family {family.name!r} come in {family.vision_inputs}"
            )

    def _score(
        self,
        model: nn.Module,
        groups: list[Group],
        outputs: tuple[str, ...],
        balance: RouterBalance | None = None,
    ) -> list:
        if not groups:
            return []
        if not torch.is_grad_enabled():  # DDP would wait for a backward
            model = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            return score(
                model,
                groups,
                temperature=self.temperature,
                outputs=outputs,
                max_tokens=self.fast.max_tokens,
                backend=self.fast.backend,
                # TRL's loss needs it for its bonus only; another's may for anything.
                entropy_grad=self._entropy_bonus_enabled or self._changed("_compute_loss"),
                workspace_mb=self.fast.workspace_mb,
                balance=balance,
                self_check=False,  # TRLCheck compares more rows, with TRL's own values
                placeholders="neutralize",
                features=self._kept_features(model),
                keep_activations=self.fast.keep_activations,
            )

    def _self_check(self, model, rows, members, logps, inputs: dict, counted: Tensor) -> None:
        """Once per model, and once more where gradients flow."""
        key = id(model), torch.is_grad_enabled()
        if not self.fast.self_check or key in self._checked:
            return
        ids = [rows.completions[row] for row in members]
        clean = [r for r, c in zip(members, ids, strict=True) if not self._is_placeholder(c).any()]
        clean = [row for row in clean if counted[row].any()]
        images = any(rows.vision[row] for row in clean)
        if not self._all_alike(bool(clean), images) or not clean:
            return
        half = self.accelerator.mixed_precision != "no"
        dtype = torch.bfloat16 if half else next(model.parameters()).dtype
        exact = computed_exactly(dtype, self.accelerator.device.type)
        values = super()._get_per_token_logps_and_entropies
        check = TRLCheck(values, Adapter(model), rows, inputs, exact)
        error = check.logps(clean, logps, counted.bool())
        self._metrics[self._mode]["fastgrpo/self_check_max_abs"].append(error)
        if torch.is_grad_enabled() and self.accelerator.num_processes == 1:
            with warnings.catch_warnings():
                # Reentrant checkpointing warns of inputs that need no gradient.
                warnings.simplefilter("ignore")
                check.gradients(clean, lambda groups: self._score(model, groups, ("logp",)))
        self._checked.add(key)

    def _all_alike(self, *facts: bool) -> bool:
        """Whether these hold in every process or in none: TRL's forward may be a collective."""
        if self.accelerator.num_processes == 1:
            return True
        votes = torch.tensor([facts], dtype=torch.float32, device=self.accelerator.device)
        votes = self.accelerator.gather(votes)
        return bool((votes == votes[0]).all())

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not load_renamed(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self.is_deepspeed_enabled or not load_renamed(
            self.model, self.state.best_model_checkpoint
        ):
            super()._load_best_model()


class FastGRPOTrainer(_FastMixin, GRPOTrainer):
    """TRL's GRPOTrainer, accelerated: same constructor, and `fast=FastOptions(...)` or a dict.

    `rule` replaces TRL's advantages, `perception` adds the terms of PAPO and VPPO: a recipe's.
    """

    _tag_names = [*GRPOTrainer._tag_names, "fastgrpo"]

    def __init__(
        self,
        *args,
        fast: FastOptions | dict | None = None,
        rule: AdvantageRule | None = None,
        perception: PerceptionRule | None = None,
        **kwargs,
    ):
        check_version()
        options = fast if isinstance(fast, FastOptions) else _options(fast or {})
        super().__init__(*args, **kwargs)
        self._install(options, rule, perception)


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
