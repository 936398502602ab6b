# SPDX-License-Identifier: Apache-2.0
"""Log-probs as rewards: how likely a model finds given continuations or choices.

Each completion is the shared prompt of its continuations, so it is encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.engine import score
from fastgrpo.engine.next_token import next_token_logits
from fastgrpo.errors import InputError
from fastgrpo.judges.bound import Chats, load_frozen
from fastgrpo.packing import Group
from fastgrpo.rewards.core.columns import row_columns, row_of
from fastgrpo.rewards.read.chat import completion_text

Context = Callable[[Any, Any, dict[str, Any]], Group]


@torch.no_grad()
def continuation_logp(
    model, contexts: Sequence[Group], continuations: Sequence[Sequence[Tensor]], **options: Any
) -> list[Tensor]:
    """Mean log-prob per token of given continuations, one (n_i,) float32 tensor per context.

    `contexts` are groups without completions, `continuations[i]` the (C,) int64 ids to score after
    context i; an empty continuation scores 0. `options` are those of `score`.
    """
    groups = [
        Group(c.prompt_ids, list(ids), c.vision, sample_id=c.sample_id)
        for c, ids in zip(contexts, continuations, strict=True)
    ]
    scores = score(model, groups, **options)
    return [torch.stack([lp.sum() / max(lp.numel(), 1) for lp in s.logp]) for s in scores]


@torch.no_grad()
def choice_probability(
    model, contexts: Sequence[Group], token_ids: Sequence[int], **options: Any
) -> Tensor:
    """Softmax over `token_ids` alone at the position after each context, (P, K) float32."""
    return next_token_logits(model, contexts, token_ids=token_ids, **options).softmax(1)


class _Likelihood:
    """A reward computed from contexts: one group a completion, built by the caller."""

    def __init__(self, model, context: Context, name: str, columns: Sequence[str], **options: Any):
        self.model, self.context, self.options = model, context, options
        self.name = self.__name__ = name
        self.columns = tuple(columns)

    def _contexts(self, prompts, completions, columns) -> list[Group]:
        columns = row_columns(columns, len(completions))
        return [
            self.context(prompt, completion, row_of(columns, i))
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]


class FollowUpLikelihood(_Likelihood):
    """FLR: what follows a good answer is likelier after it than what follows a bad one.

    R = mean over dimensions of (mean log-prob of the positive follow-ups - of the negative ones),
    a mean log-prob per token under a frozen `model`. `dimensions` lists, for each, the token ids
    of its positive and of its negative sentences. `context(prompt, completion, row)` gives the
    text so far as a Group. Source: FLR (e0397123/FLR), whose code averages raw logits at one
    position where its paper says likelihood; this is the likelihood.
    """

    def __init__(
        self,
        model,
        context: Context,
        dimensions: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
        *,
        name: str = "follow_up_likelihood",
        columns: Sequence[str] = (),
        **options: Any,
    ):
        super().__init__(model, context, name, columns, **options)
        if not dimensions or not all(good and bad for good, bad in dimensions):
            raise InputError("dimensions: each needs positive and negative follow-ups")
        self.dimensions = dimensions
        self.range = (-float("inf"), float("inf"))

    @classmethod
    def from_trainer(
        cls, trainer: Any, dimensions: Sequence[dict[str, Sequence[str]]], *,
        model: str | None = None, **options: Any,
    ) -> FollowUpLikelihood:  # fmt: skip
        """Dimensions are {"positive": texts, "negative": texts}; the context is the row's chat."""
        chats = Chats(trainer)
        sides = [[list(map(chats.ids, d[k])) for k in ("positive", "negative")] for d in dimensions]
        return cls(load_frozen(model, trainer), _said(chats), sides, **options)

    def __call__(self, prompts, completions, **columns) -> list[float]:
        """One contrast a completion."""
        follow_ups = [ids for good, bad in self.dimensions for ids in (*good, *bad)]
        contexts = self._contexts(prompts, completions, columns)
        scores = continuation_logp(
            self.model, contexts, [follow_ups] * len(contexts), **self.options
        )
        return [self._contrast(s) for s in scores]

    def _contrast(self, logp: Tensor) -> float:
        sizes = [len(side) for pair in self.dimensions for side in pair]
        means = torch.stack([side.mean() for side in logp.split(sizes)])
        return (means[0::2] - means[1::2]).mean().item()


class ChoiceProbability(_Likelihood):
    """The probability a frozen model gives the right choice after reading the reasoning.

    Softmax over `token_ids` (one per choice) at the position after the context; the column
    `choice` holds the index of the right one. Listener rewards a policy's reasoning so; VL-PRM
    scores a step by the two tokens '+' and '-' of a judge prompt.
    """

    def __init__(
        self,
        model,
        context: Context,
        token_ids: Sequence[int],
        *,
        name: str = "choice_probability",
        columns: Sequence[str] = (),
        **options: Any,
    ):
        super().__init__(model, context, name, ("choice", *columns), **options)
        self.token_ids = list(token_ids)
        self.range = (0.0, 1.0)

    @classmethod
    def from_trainer(
        cls, trainer: Any, choices: Sequence[str], *, model: str | None = None,
        reply: str = "{completion}", **options: Any,
    ) -> ChoiceProbability:  # fmt: skip
        """The choices are the first tokens of texts; the context is the row's chat and `reply`."""
        chats = Chats(trainer)
        first = [chats.ids(choice)[0].item() for choice in choices]
        return cls(load_frozen(model, trainer), _said(chats, reply), first, **options)

    def __call__(self, prompts, completions, *, choice, **columns) -> list[float]:
        """One probability a completion."""
        contexts = self._contexts(prompts, completions, columns | {"choice": choice})
        table = choice_probability(self.model, contexts, self.token_ids, **self.options)
        right = torch.as_tensor(list(choice), device=table.device)
        return table.gather(1, right[:, None])[:, 0].tolist()


def _said(chats: Chats, reply: str = "{completion}") -> Context:
    """The row's chat with its images, and the completion in the words of `reply`."""

    def context(prompt: Any, completion: Any, row: dict[str, Any]) -> Group:
        said = reply.replace("{completion}", completion_text(completion))
        return chats.row_group(prompt, row, said)

    return context
