# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5 and 3.6 with a mixture of experts in every layer."""

from fastgrpo.models.moe import Experts
from fastgrpo.models.qwen3_5 import GatedDeltaNet, Qwen35


class Qwen35Moe(Experts, Qwen35):
    """As Qwen3.5."""

    def tiny_mixers(self, text):
        return self.tiny_experts(super().tiny_mixers(text))


class Qwen35MoeText(Experts, GatedDeltaNet):
    """Its decoder alone."""

    def tiny_mixers(self, text):
        return self.tiny_experts(super().tiny_mixers(text))


FAMILIES = (Qwen35Moe("qwen3_5_moe"), Qwen35MoeText("qwen3_5_moe_text"))
