# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL with a mixture of experts."""

from fastgrpo.models.moe import Experts
from fastgrpo.models.qwen3_vl import Qwen3VL


class Qwen3VLMoe(Experts, Qwen3VL):
    """As Qwen3-VL."""

    def tiny_parts(self, text, vision):
        text, vision = super().tiny_parts(text, vision)
        return self.tiny_experts(text), vision


FAMILIES = (Qwen3VLMoe("qwen3_vl_moe"),)
