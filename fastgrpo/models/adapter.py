# SPDX-License-Identifier: Apache-2.0
"""One model as the engine sees it: the wrapper to call, the model inside, its family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrpo import attention, recurrence
from fastgrpo.errors import InputError
from fastgrpo.models.head import SOFTCAP
from fastgrpo.models.registry import family_of


class Adapter:
    """A supported model, checked. `InputError` says why another is refused.

    `root` is what the caller trains (plain, PEFT, DDP, FSDP2): every call goes through it, so that
    its hooks run. `core` is the transformers model inside. `softcap` is the c of a model that caps
    its logits z, c tanh(z / c).
    """

    def __init__(self, model: nn.Module):
        self.root = model
        self.core, self.peft = _unwrap(model)
        self.config = self.core.config
        self.text_config = getattr(self.config, "text_config", None) or self.config
        self.family = family_of(self.config)
        self.softcap: float | None = getattr(self.text_config, SOFTCAP, None)
        self.head = self.core.get_output_embeddings()
        if self.head is None:
            raise InputError(f"{type(self.core).__name__} has no lm_head; load the model with one")
        self.mixers = self.family.mixers(self.core)
        self.placeholders = self.family.placeholders(self.config)

    @property
    def device(self) -> torch.device:
        return next(self.core.parameters()).device

    def prepare(self, backend: str | None) -> str:
        """Refuse what a packed row cannot express, switch attention, and name the backend."""
        self._check_dropout()
        if self.core.training:
            self.family.check_training(self.core)
        if not attention.is_installed(self.core):
            attention.install(self.core, tower=self.family.varlen_tower)
        recurrence.install(self.mixers)
        case = (self.device, self._compute_dtype(), self.family.head_dim(self.text_config))
        return attention.choose_backend(backend, *case, blocks=self.family.two_way(self.config))

    def forward(self, inputs: dict):
        """The root's output for a packed row; `RecurrenceError` when a layer ignored its layout."""
        if not self.mixers:
            return self.root(**inputs)
        with recurrence.counted_calls(self.mixers):
            return self.root(**inputs)

    def prompt_positions(self, prompt_ids: Tensor, vision: dict[str, Tensor]) -> Tensor:
        """(A, P + 1) positions of one prompt and of what follows it, A = 3 for an M-RoPE family,
        else 1."""
        return self.family.positions(self.core, prompt_ids, vision)

    def features_are_constant(self) -> bool:
        """Whether nothing before the decoder is trained or adapted, so image features can be kept.

        The projector counts: LLaVA's stands beside the tower, and may learn while that is frozen.
        """
        before = self.before_decoder()
        return bool(before) and not any(
            p.requires_grad or "lora_" in name or "modules_to_save" in name
            for name, p in self.core.named_parameters()
            if id(p) in before
        )

    def before_decoder(self) -> set[int]:
        """The `id`s of the parameters that only images reach: of the tower and the projector."""
        if not self.family.vision_inputs:
            return set()
        decoder = {
            id(p) for part in (self.core.get_decoder(), self.head) for p in part.parameters()
        }
        return {id(p) for p in self.core.parameters()} - decoder

    def _compute_dtype(self) -> torch.dtype:
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return next(p.dtype for p in self.core.parameters() if p.is_floating_point())

    def dropout(self, *, active_only: bool = False) -> str | None:
        """What drops out where, if any module does; `active_only`: if one in train mode does.

        Dropout would draw one mask for a shared prompt where the plain forward draws G.
        """
        for name, module in self.core.named_modules():
            rate = module.p if isinstance(module, nn.Dropout) else 0.0
            rate = rate or getattr(module, "attention_dropout", 0.0)
            if rate and (module.training or not active_only):
                return (
                    f"dropout {rate} in {name or 'the model'}: a prompt shared by its completions "
                    f"has one dropout mask where separate forwards have one each; set it to 0 "
                    f"(attention_dropout, lora_dropout) or call model.eval()"
                )
        return None

    def _check_dropout(self):
        if self.core.training and (reason := self.dropout(active_only=True)):
            raise InputError(reason)


def _unwrap(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The transformers model inside DDP, torch.compile and PEFT wrappers, and the PEFT wrapper."""
    from transformers import PreTrainedModel

    peft = None
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # PEFT
            peft = model
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                raise InputError(
                    f"PEFT {model.active_peft_config.peft_type} adds virtual tokens in front of "
                    f"the row, which a packed row cannot place before each prompt"
                )
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):  # DDP, DeepSpeed
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            raise InputError(
                f"model must be a transformers model, plain or wrapped, got {type(model).__name__}"
            )
    return model, peft
