# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Next: text, gated DeltaNet and a mixture of experts."""

from fastgrpo.models.qwen3_5_moe import Qwen35MoeText

FAMILIES = (Qwen35MoeText("qwen3_next"),)
