# SPDX-License-Identifier: Apache-2.0
"""Qwen3 with a mixture of experts: text."""

from fastgrpo.models.moe import Experts
from fastgrpo.models.qwen3 import Qwen3


class Qwen3Moe(Experts, Qwen3):
    """As Qwen3."""

    def tiny_config(self, text, vision, ids, **top):
        return super().tiny_config(self.tiny_experts(text), vision, ids, **top)


FAMILIES = (Qwen3Moe("qwen3_moe"),)
