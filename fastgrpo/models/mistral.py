# SPDX-License-Identifier: Apache-2.0
"""Mistral: text, with a sliding window where the config has one."""

from fastgrpo.models.family import Family


class Mistral(Family):
    """As any decoder; a small one has a short window."""

    def tiny_config(self, text, vision, ids, **top):
        return super().tiny_config({"sliding_window": 12} | text, vision, ids, **top)


FAMILIES = (Mistral("mistral"),)
