"""Qwen3.5 and 3.6 with a mixture of experts in every layer."""

from fastgrpo.models.moe import tiny_experts
from fastgrpo.models.qwen3_5 import GatedDeltaNet, Qwen35


class Qwen35Moe(Qwen35):
    """As Qwen3.5; experts are token-wise, so a packed row changes nothing for them."""

    def tiny_mixers(self, text):
        return tiny_experts(super().tiny_mixers(text))


class Qwen35MoeText(GatedDeltaNet):
    """Its decoder alone."""

    def tiny_mixers(self, text):
        return tiny_experts(super().tiny_mixers(text))


FAMILIES = (Qwen35Moe("qwen3_5_moe"), Qwen35MoeText("qwen3_5_moe_text"))
