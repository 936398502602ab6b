# SPDX-License-Identifier: Apache-2.0
"""The model's attention is ours between a packed forward and its backward, and no longer."""

from __future__ import annotations

from trl import GRPOTrainer

from fastgrpo import attention
from fastgrpo.integrations.trl.support import core_model


class AttentionMixin:
    """Callbacks, rewards, evaluation, saving and whoever has the model after training find the
    attention it came with."""

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        finally:
            give_back_attention(self)

    def prediction_step(self, *args, **kwargs):
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            give_back_attention(self)

    def _calculate_rewards(self, *args, **kwargs):
        give_back_attention(self)
        return super()._calculate_rewards(*args, **kwargs)


def give_back_attention(trainer: GRPOTrainer) -> None:
    """Gives the models the attention they came with, for code that asks for it by name.

    The next packed row takes it again. Not between a forward and its backward: gradient
    checkpointing runs the forward once more.
    """
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            core = core_model(trainer.accelerator.unwrap_model(model))
            if attention.is_installed(core):
                attention.uninstall(core)
