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
    """Suppressed ids, then temperature, then top-k, then top-p; temperature 0 takes the maximum.

    `top_k` 0 and `top_p` 1 keep every token. Ties at the k-th logit are all kept, as in
    transformers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    suppress: Sequence[int] = ()

    def __post_init__(self):
        if not (self.temperature >= 0.0 and self.temperature < float("inf")):
            raise InputError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) float32 distribution a token is drawn from; a one-hot for temperature 0."""
        logits = logits.float()
        if self.suppress:
            ids = torch.as_tensor(list(self.suppress), device=logits.device)
            logits = logits.index_fill(1, ids, float("-inf"))
        if self.temperature == 0.0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, 1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1.0:
            ordered, index = logits.sort(1)
            tail = ordered.softmax(1).cumsum(1) <= 1.0 - self.top_p
            tail[:, -1] = False
            drop = torch.zeros_like(tail).scatter_(1, index, tail)
            logits = logits.masked_fill(drop, float("-inf"))
        return logits.softmax(1)

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """(B,) token ids and their log-probs under softmax(logits / temperature), all tokens in.

        That is the policy's own log-prob, the one `score` gives: what top-k, top-p and suppressed
        ids cut away is not renormalised into it.
        """
        tokens = torch.multinomial(self.probabilities(logits), 1, generator=generator)
        logp = torch.log_softmax(logits.float() / (self.temperature or 1.0), 1)
        return tokens[:, 0], logp.gather(1, tokens)[:, 0]
