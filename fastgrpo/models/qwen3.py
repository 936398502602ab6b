# SPDX-License-Identifier: Apache-2.0
"""Qwen3: text, with a head size of its own."""

from fastgrpo.models.family import Family


class Qwen3(Family):
    """As Llama; the head size is a field of the config."""

    def tiny_config(self, text, vision, ids, **top):
        return super().tiny_config({"head_dim": 8} | text, vision, ids, **top)


FAMILIES = (Qwen3("qwen3"),)
