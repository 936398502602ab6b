# SPDX-License-Identifier: Apache-2.0
"""Where each row of a rollout stands: its length, whether it ended, what its text may match.

Letters: P prompts, G completions per prompt, B = P G rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.errors import InputError

_NO_TOKEN = torch.iinfo(torch.int64).max  # matches no stop string


def stop_criterion(stop_strings: str | Sequence[str] | None, tokenizer):
    """transformers' StopStringCriteria for these strings, None without any."""
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if not strings:
        return None
    if tokenizer is None:
        raise InputError(f"stop_strings={strings} need the tokenizer that spells the tokens")
    if not all(isinstance(text, str) and text for text in strings):
        raise InputError(f"stop_strings must be strings of at least one character, got {strings}")
    from transformers import StopStringCriteria

    return StopStringCriteria(tokenizer, strings)


class Progress:
    """The rows of one rollout. A row ends with an end id, or with a token that completes a stop
    string, counted with the prompt's own text before it.

    `lengths` (B,): tokens each row has, its last one included. `seen` (B, V) bool: the tokens of
    prompt and completion so far, kept only where `vocabulary` is given.
    """

    def __init__(
        self,
        prompts: Sequence[Tensor],
        group_size: int,
        ends: Tensor,
        *,
        criterion=None,
        vocabulary: int | None = None,
    ):
        device, total = ends.device, len(prompts) * group_size
        self.ends, self.criterion, self.num_tokens = ends, criterion, 0
        self.running = torch.ones(total, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(total, dtype=torch.int64, device=device)
        self.seen = self.tail = None
        if vocabulary is not None:
            seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
            for row, ids in zip(seen, prompts, strict=True):
                row[ids.cpu()] = True
            self.seen = seen.repeat_interleave(group_size, 0).to(device)
        if criterion is not None:
            width = criterion.maximum_token_len
            tail = torch.full((len(prompts), width), _NO_TOKEN)
            for row, ids in zip(tail, prompts, strict=True):
                row[max(width - ids.numel(), 0) :] = ids[-width:]
            self.tail = tail.repeat_interleave(group_size, 0).to(device)

    def add(self, tokens: Tensor) -> bool:
        """Appends one token (B,) to every row that has not ended; whether any goes on."""
        self.num_tokens += 1
        self.lengths += self.running
        ended = torch.isin(tokens, self.ends)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.tail is not None:
            self.tail = torch.cat([self.tail[:, 1:], tokens[:, None]], 1)
            ended = ended | self.criterion(self.tail, None)
        self.running &= ~ended
        return bool(self.running.any())
