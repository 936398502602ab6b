# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token, in the order transformers applies its processors.

B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Repetition penalty, no end token yet, suppressed ids, temperature, top-k, top-p, min-p.

    The penalty divides the positive logits of tokens a row has had, and multiplies the negative
    ones, once each; the first `min_new_tokens` tokens are none of `ends`. Temperature 0 takes the
    maximum of what is left. `top_k` 0, `top_p` 1 and `min_p` 0 keep every token, `min_p` those of
    at least that share of the likeliest token's probability. Ties at the k-th logit are all kept,
    as in transformers. `suppress` and `ends` are ids, best as a tensor on the logits' device.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    suppress: Sequence[int] | Tensor = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    ends: Sequence[int] | Tensor = ()

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise InputError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise InputError(
                f"repetition_penalty must be positive and finite, got {self.repetition_penalty}"
            )
        if self.min_new_tokens < 0:
            raise InputError(f"min_new_tokens must be at least 0, got {self.min_new_tokens}")

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1.0

    def probabilities(
        self, logits: Tensor, seen: Tensor | None = None, num_tokens: int = 0
    ) -> Tensor:
        """(B, V) float32 distribution a token is drawn from; a one-hot for temperature 0.

        `seen` (B, V) bool: the tokens of each row so far, its prompt's too; only a penalty reads
        it. `num_tokens`: how many tokens each row has generated.
        """
        logits = self._processed(logits.float(), seen, num_tokens)
        if self.temperature == 0.0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        return self._warped(logits / self.temperature).softmax(1)

    def _processed(self, logits: Tensor, seen: Tensor | None, num_tokens: int) -> Tensor:
        if self.penalizes:
            penalty = self.repetition_penalty
            penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen, penalized, logits)
        every_id = torch.arange(logits.shape[1], device=logits.device)
        for ids in (self.suppress, self.ends if num_tokens < self.min_new_tokens else ()):
            if len(ids):  # of which some may lie outside the vocabulary
                banned = torch.isin(every_id, torch.as_tensor(ids, device=logits.device))
                logits = logits.masked_fill(banned, float("-inf"))
        return logits

    def _warped(self, logits: Tensor) -> Tensor:
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, 1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1.0:
            ordered, index = logits.sort(1)
            tail = ordered.softmax(1).cumsum(1) <= 1.0 - self.top_p
            tail[:, -1] = False
            drop = torch.zeros_like(tail).scatter_(1, index, tail)
            logits = logits.masked_fill(drop, float("-inf"))
        if self.min_p > 0.0:
            share = logits.softmax(1)
            drop = share < self.min_p * share.amax(1, keepdim=True)
            logits = logits.masked_fill(drop, float("-inf"))
        return logits

    def draw(
        self,
        logits: Tensor,
        generator: torch.Generator | None,
        seen: Tensor | None = None,
        num_tokens: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(B,) token ids and their log-probs under softmax(logits / temperature), all tokens in.

        That is the policy's own log-prob, the one `score` gives: what penalties, cuts and
        suppressed ids change is not in it.
        """
        share = self.probabilities(logits, seen, num_tokens)
        tokens = torch.multinomial(share, 1, generator=generator)
        logp = torch.log_softmax(logits.float() / (self.temperature or 1.0), 1)
        return tokens[:, 0], logp.gather(1, tokens)[:, 0]
