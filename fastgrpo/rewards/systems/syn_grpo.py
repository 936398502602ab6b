# SPDX-License-Identifier: Apache-2.0
"""Syn-GRPO, by its abstract: diversity of the image descriptions within a group."""

from __future__ import annotations

import numpy as np

from fastgrpo.rewards.core.columns import group_numbers
from fastgrpo.rewards.core.registry import reward
from fastgrpo.rewards.read.tags import between

MAX_WORDS = 4096


@reward("syn_grpo/diversity", optional=("prompts",), batched=True,
        source="Syn-GRPO, our own reading of the abstract")  # fmt: skip
def syn_diversity(texts, note, *, prompts=None, tag: str = "description"):
    """1 - mean Jaccard similarity of the words with those of the group's other completions.

    Words are those in `<description>`, or of the whole text without it. A group of one has 0.
    Syn-GRPO's abstract rewards the diversity of predicted image descriptions; the measure is ours.
    """
    number = group_numbers(prompts, len(texts))
    words = [_words(text, tag) for text in texts]
    scores = [0.0] * len(texts)
    for group in np.unique(number):
        rows = np.flatnonzero(number == group)
        codes: dict[str, int] = {}
        sets = [[codes.setdefault(w, len(codes)) for w in words[i]] for i in rows]
        table = np.zeros((len(rows), max(len(codes), 1)), dtype=np.float32)
        for k, one in enumerate(sets):
            table[k, one] = 1
        both, sizes = table @ table.T, table.sum(1)
        union = sizes[:, None] + sizes[None] - both
        alike = np.where(union > 0, both / np.maximum(union, 1), 1.0)
        for k, i in enumerate(rows):
            others = np.delete(alike[k], k)
            scores[i] = float(1 - others.mean()) if len(others) else 0.0
    return scores


def _words(text: str, tag: str) -> set[str]:
    inner = between(text, f"<{tag}>", f"</{tag}>")
    return set((text if inner is None else inner)[: 16 * MAX_WORDS].lower().split()[:MAX_WORDS])
