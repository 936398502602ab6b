# SPDX-License-Identifier: Apache-2.0
"""TRL's rollout by `fastgrpo.rollout.generate`: each prompt and its images prefilled once."""

from __future__ import annotations

import logging
import reprlib

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from trl.extras.profiling import profiling_context

from fastgrpo.engine.continuation import KeptPrompts
from fastgrpo.engine.parallel import is_zero3
from fastgrpo.errors import InputError
from fastgrpo.integrations.trl.attention import give_back_attention
from fastgrpo.integrations.trl.gathering import whole_policy
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing import Group
from fastgrpo.packing.planner import regroup
from fastgrpo.packing.vision import KeptFeatures
from fastgrpo.rollout import generate

logger = logging.getLogger(__name__)

# What a packed rollout implements of transformers' generation settings.
_OBEYED = frozenset(
    "do_sample max_new_tokens min_new_tokens stop_strings eos_token_id suppress_tokens "
    "temperature top_k top_p min_p repetition_penalty".split()
)
# Without effect on the tokens that are sampled: max_new_tokens takes the place of max_length.
_WITHOUT_EFFECT = frozenset(
    "max_length pad_token_id bos_token_id disable_compile transformers_version".split()
)


class RolloutMixin:
    """Samples in packed rows wherever they obey every setting; elsewhere TRL does, and is named."""

    _prompts: KeptPrompts | None = None

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        finally:
            if self.accelerator.sync_gradients:  # the weights will be others
                self._prompts = None

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False
    ):
        settings = self._packed_settings(has_tool_images)
        if settings is None:
            give_back_attention(self)
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        with (
            profiling_context(self, "transformers.generate"),
            self.accelerator.autocast(),
            whole_policy(self) as model,
        ):
            self._prompts = None  # frees what is left of another batch
            self._prompts = self._keep_prompts(model)
            completion_ids = sample_rows(
                model,
                prompt_ids,
                multimodal_fields,
                None if images is None else [len(row or ()) for row in images],
                settings,
                tokenizer=self._tokenizer,
                max_tokens=self.fast.max_tokens,
                backend=self.fast.backend,
                features=self._kept_features(model),
                keep=self._prompts,
                cuda_graphs=self.fast.cuda_graphs,
            )
        return completion_ids, None

    def _keep_prompts(self, model: nn.Module) -> KeptPrompts | None:
        """What the first fused loss after this rollout needs not compute again.

        None where no such loss will ask, where it is for a part of the prompts, so that the others
        would wait in memory, and where an engine has hooks around the model's forward.
        """
        fused = self._mode == "train" and not (self._per_token or self.aux_loss_enabled)
        whole = self.args.steps_per_generation == 1 == self.fast.max_generation_batches
        alone = self.accelerator.distributed_type == DistributedType.NO
        wanted = self.fast.keep_prompts and fused and whole and alone and not self.tools
        if not (wanted and KeptPrompts.serves(adapter := Adapter(model))):
            return None
        return KeptPrompts(adapter, keep_activations=self.fast.keep_activations)

    def _packed_settings(self, has_tool_images: bool) -> GenerationConfig | None:
        """The settings to sample with in packed rows; None: TRL samples, and the log says why."""
        if self.fast.packed_rollout is False:
            return None
        settings, reason = packed_settings(self, has_tool_images)
        if reason is None:
            return settings
        if self.fast.packed_rollout:
            raise InputError(
                f"packed_rollout=True: {reason}; leave packed_rollout out or change it"
            )
        if reason not in {*self._logged_reasons, self._padded_reason}:
            self._logged_reasons.add(reason)
            logger.warning(
                "packed rollout: %s, so TRL's own generation samples, which encodes a prompt and "
                "its images once per completion and not once per group",
                reason,
            )
        return None


def effective_settings(model: PreTrainedModel, config: GenerationConfig) -> GenerationConfig:
    """What `model.generate(generation_config=config)` goes by: unset fields are the model's own."""
    settings, _ = model._prepare_generation_config(config)
    return settings


def unserved_setting(settings: GenerationConfig, eos_token_ids: list[int]) -> str | None:
    """The first setting that a packed rollout would not obey, as `name=value`; None: it obeys all.

    `settings` are effective ones. Every field that differs from transformers' default must be
    among those implemented, so that a field added tomorrow counts as one that is not.
    """
    neutral = GenerationConfig()
    neutral.update(**neutral._get_default_generation_params(), defaults_only=True)
    for name, value in sorted(vars(settings).items()):
        if name in _OBEYED or name in _WITHOUT_EFFECT or name.startswith("_"):
            continue
        default = getattr(neutral, name, None)
        if value is not None and value != (False if default is None else default):
            return f"{name}={reprlib.repr(value)}"
    if settings.max_new_tokens is None:
        return "max_new_tokens=None"
    # TRL cuts a completion at its own end ids; another set leaves the padding in.
    ends = settings.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    return None if set(ends) == set(eos_token_ids) else f"eos_token_id={settings.eos_token_id}"


def packed_settings(trainer, has_tool_images: bool) -> tuple[GenerationConfig | None, str | None]:
    """The effective settings of the trainer's rollouts, and why packed rows cannot obey them."""
    if trainer._padded_reason:
        return None, trainer._padded_reason
    if trainer.use_vllm:
        return None, "use_vllm=True samples in another engine"
    if trainer.use_transformers_continuous_batching:
        return None, "use_transformers_continuous_batching=True is another engine"
    if has_tool_images:
        return None, "a tool returned images inside a completion"
    root = trainer.accelerator.unwrap_model(trainer.model)
    model = Adapter(root).core
    if not _generates_as_transformers(root, model):
        return None, f"{type(model).__name__}.generate is not transformers' own"
    if is_zero3(model) and not trainer.args.ds3_gather_for_generation:
        return None, "ds3_gather_for_generation=False leaves ZeRO-3's weights in shards"
    settings = effective_settings(model, trainer.generation_config)
    unserved = unserved_setting(settings, trainer.eos_token_ids)
    return settings, unserved and f"{unserved} is not implemented"


def _generates_as_transformers(root: nn.Module, model: PreTrainedModel) -> bool:
    """Whether nobody gave the model, or its PEFT wrapper, a `generate` of its own.

    accelerate lets FSDP's hooks run around it, which changes nothing of what it does.
    """
    for module in (root, model):
        own = getattr(vars(module).get("generate"), "__func__", vars(module).get("generate"))
        hooked = getattr(own, "__globals__", {}).get("__name__", "")
        if own is not None and not hooked.startswith("torch.distributed.fsdp."):
            return False
    return getattr(type(model).generate, "__qualname__", None) == "GenerationMixin.generate"


def sample_rows(
    model,
    prompt_ids: list[list[int]],
    fields: dict,
    num_images: list[int] | None,
    settings: GenerationConfig,
    *,
    tokenizer=None,
    max_tokens: int | None = None,
    backend: str | None = None,
    features: KeptFeatures | None = None,
    keep: KeptPrompts | None = None,
    cuda_graphs: bool = True,
) -> list[list[int]]:
    """One completion per row, in row order; rows with the same prompt and images are one group.

    `prompt_ids` and `fields` are those of TRL's `_generate_single_turn`, `settings` effective ones
    that `unserved_setting` has passed; the others are as in `generate`. A completion ends with its
    first end token or with the token that completes a stop string. Rows that are whole groups in
    order take the random numbers that TRL's rows would take.
    """
    # The processor leaves images as arrays or lists; TRL, too, makes tensors of them only here.
    family = Adapter(model).family
    images = {
        key: value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        for key in family.vision_inputs
        if (value := fields.get(key)) is not None
    }
    config = Adapter(model).config
    counts = num_images and family.image_counts(config, prompt_ids, images, num_images)
    vision = family.split_rows(images, counts, len(prompt_ids))
    # With a token in place of a completion, `regroup` finds the rows that share prompt and images.
    some = torch.zeros(1, dtype=torch.int64)
    rows = [
        Group(torch.tensor(ids), [some], images, sample_id=f"row {i}")
        for i, (ids, images) in enumerate(zip(prompt_ids, vision, strict=True))
    ]
    by_size: dict[int, list[list[int]]] = {}
    for part in regroup(rows):
        members = [row for row, _ in part.members]
        by_size.setdefault(len(members), []).append(members)
    completions: list[list[int]] = [[] for _ in rows]
    for size, parts in by_size.items():
        groups = [Group(rows[m[0]].prompt_ids, [], rows[m[0]].vision) for m in parts]
        filled = generate(
            model,
            groups,
            size,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            backend=backend,
            features=features,
            keep=keep,
            cuda_graphs=cuda_graphs,
            **_keywords(settings),
        )
        for members, group in zip(parts, filled, strict=True):
            for row, ids in zip(members, group.completions, strict=True):
                completions[row] = ids.tolist()
    return completions


def _keywords(settings: GenerationConfig) -> dict:
    """The settings under the names of `generate`; warpers act on samples only, not on a maximum."""
    keywords = dict(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or 0,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=() if settings.eos_token_id is None else settings.eos_token_id,
        suppress_token_ids=settings.suppress_tokens or (),
        stop_strings=settings.stop_strings,
        temperature=0.0,
    )
    if settings.do_sample:
        keywords |= dict(
            temperature=settings.temperature,
            top_k=settings.top_k or 0,
            top_p=settings.top_p,
            min_p=settings.min_p or 0.0,
        )
    return keywords
