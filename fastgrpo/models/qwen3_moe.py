"""Qwen3 with a mixture of experts: text."""

from fastgrpo.models.moe import tiny_experts
from fastgrpo.models.qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    """As Qwen3; experts are token-wise."""

    def tiny_config(self, text, vision, ids, **top):
        return super().tiny_config(tiny_experts(text), vision, ids, **top)


FAMILIES = (Qwen3Moe("qwen3_moe"),)
