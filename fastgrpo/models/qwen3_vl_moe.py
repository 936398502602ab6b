"""Qwen3-VL with a mixture of experts."""

from fastgrpo.models.moe import tiny_experts
from fastgrpo.models.qwen3_vl import Qwen3VL


class Qwen3VLMoe(Qwen3VL):
    """As Qwen3-VL; experts are token-wise."""

    def tiny_parts(self, text, vision):
        text, vision = super().tiny_parts(text, vision)
        return tiny_experts(text), vision


FAMILIES = (Qwen3VLMoe("qwen3_vl_moe"),)
