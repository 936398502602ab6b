# SPDX-License-Identifier: Apache-2.0
"""Models in the same process as rewards, frozen or trained beside the policy.

B completions, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.engine import score
from fastgrpo.errors import InputError
from fastgrpo.judges.bound import Chats, load_frozen
from fastgrpo.rewards.read.chat import chat_text, completion_text, text_only


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(r_chosen - r_rejected) over pairs; 0 without pairs."""
    if not chosen.numel():
        return chosen.sum() + rejected.sum()
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def trajectory_preference_loss(
    log_ratio: Tensor, lengths: Sequence[int], trajectories: Sequence[Hashable], won: Sequence[bool]
) -> Tensor:
    """-log sigmoid(s_win - s_lose), mean over all win x lose pairs of one group; differentiable.

    s of a trajectory is the mean over its turns of ``log_ratio`` summed over the turn's tokens;
    ``log_ratio`` (T,) holds beta log(pi_phi / pi_ref) of all turns back to back, ``lengths`` their
    token counts. 0 when a side is empty. Source: OPRL / iStar (``istar/rm_utils.py``).
    """
    turns = torch.stack([t.sum() for t in log_ratio.split(list(lengths))])
    ids = list(dict.fromkeys(trajectories))
    score = {t: turns[[i for i, u in enumerate(trajectories) if u == t]].mean() for t in ids}
    outcome = {t: bool(w) for t, w in zip(trajectories, won, strict=True)}
    gaps = [score[w] - score[x] for w in ids for x in ids if outcome[w] and not outcome[x]]
    if not gaps:
        return log_ratio.sum() * 0.0
    return -torch.nn.functional.logsigmoid(torch.stack(gaps)).mean()


class ModelReward:
    """A reward model in this process as a reward function in TRL's signature.

    ``score(texts) -> (B,)`` runs under no_grad in batches of ``batch_size``. ``prefetch`` scores a
    batch in a worker thread while the caller goes on; the call then only waits. ``transform`` maps
    raw scores to rewards, such as ``torch.sigmoid``.
    """

    def __init__(
        self,
        score: Callable[[list[str]], Tensor],
        *,
        batch_size: int = 32,
        transform: Callable[[Tensor], Tensor] | None = None,
        range: tuple[float, float] = (-float("inf"), float("inf")),
        name: str = "model_reward",
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size: expected at least 1, got {batch_size}")
        self._score, self._batch_size, self._transform = score, batch_size, transform
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: tuple[list[str], Future[list[float]]] | None = None
        self.name = self.__name__ = name
        self.columns: tuple[str, ...] = ()
        self.range = range

    @classmethod
    def from_classifier(cls, model: nn.Module, tokenizer, *, max_length: int = 4096, **options):
        """From a sequence classifier of transformers: the reward is ``logits[:, 0]``."""

        return cls(classifier_score(model, tokenizer, max_length=max_length), **options)

    def prefetch(self, prompts: Sequence, completions: Sequence, **columns: Any) -> None:
        """Start scoring a batch without waiting for it."""
        texts = self._texts(prompts, completions)
        self._pending = (texts, self._pool.submit(self._run, texts))

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """Rewards in the order of ``completions``."""
        texts = self._texts(prompts, completions)
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == texts:
            return pending[1].result()
        return self._pool.submit(self._run, texts).result()

    def _texts(self, prompts: Sequence, completions: Sequence) -> list[str]:
        pairs = zip(prompts, completions, strict=True)
        return [f"{chat_text(p)}\n{chat_text(c)}" for p, c in pairs]

    @torch.no_grad()
    def _run(self, texts: list[str]) -> list[float]:
        # Longest first, so that a batch holds rows of similar length and little padding.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        rewards = [0.0] * len(texts)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            values = self._score([texts[i] for i in rows])
            if self._transform is not None:
                values = self._transform(values)
            for i, value in zip(rows, values.float().tolist(), strict=True):
                rewards[i] = value
        return rewards


class _Learner:
    """A reward whose model learns by `_optimizer`; both travel in checkpoints."""

    _optimizer: torch.optim.Optimizer

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """The parameters in the optimizer's order, and the optimizer's own state."""
        parameters = [p.detach() for p in self._parameters()]
        return {"parameters": parameters, "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for own, kept in zip(self._parameters(), state["parameters"], strict=True):
            own.copy_(kept)
        self._optimizer.load_state_dict(state["optimizer"])


class CoTrainedReward(_Learner):
    """A reward model that takes one optimizer step on each batch it scores.

    Rewards are the model's scores *before* the step. Pairs are formed inside each prompt's group:
    every completion that ``rule`` calls right against every one it calls wrong; the loss is
    ``bradley_terry_loss``. Cooper takes its negatives from a language model instead of the
    group: pass ``pairs`` to choose them differently. Source: Cooper (a reward model updated with
    the policy), Bradley-Terry loss.

    Args:
        score: ``f(texts) -> (B,)`` raw scores, differentiable in the model's parameters.
        rule: a reward function; a value > 0.5 is right.
        optimizer: over the reward model's parameters.
        group_size: completions per prompt, consecutive.
        pairs: ``f(texts, values (B,), group_size) -> list of (chosen text, rejected text)``.
    """

    def __init__(
        self,
        score: Callable[[list[str]], Tensor],
        rule: Callable[..., list[float | None]],
        optimizer: torch.optim.Optimizer,
        *,
        group_size: int,
        transform: Callable[[Tensor], Tensor] = torch.sigmoid,
        pairs: Callable[[list[str], list, int], list[tuple[str, str]]] | None = None,
        max_grad_norm: float = 1.0,
        name: str = "co_trained_reward",
    ) -> None:
        self._score, self._rule, self._optimizer = score, rule, optimizer
        self._group_size, self._transform = group_size, transform
        self._pairs = pairs or group_pairs
        self._max_grad_norm = max_grad_norm
        self.name = self.__name__ = name
        self.columns = tuple(getattr(rule, "columns", ()))
        self.range = (0.0, 1.0)
        self.losses: list[float] = []

    @classmethod
    def from_trainer(
        cls, trainer: Any, path: str, rule: Callable, *, learning_rate: float = 1e-6, **options: Any
    ) -> CoTrainedReward:
        """A sequence classifier of transformers on the trainer's device, learning by AdamW."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(path)
        model, tokenizer = model.to(trainer.accelerator.device), AutoTokenizer.from_pretrained(path)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        return cls(classifier_score(model, tokenizer), rule, optimizer, **options)

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """Rewards of this batch; then the model learns from it."""
        both = zip(prompts, completions, strict=True)
        texts = [f"{chat_text(p)}\n{chat_text(c)}" for p, c in both]
        with torch.no_grad():
            rewards = self._transform(self._score(texts)).float().tolist()
        values = self._rule(prompts=prompts, completions=completions, **columns)
        pairs = self._pairs(texts, values, self._group_size)
        if pairs:
            self._learn(pairs)
        return rewards

    def _learn(self, pairs: list[tuple[str, str]]) -> None:
        with torch.enable_grad():
            scores = self._score([c for c, _ in pairs] + [r for _, r in pairs])
            loss = bradley_terry_loss(*scores.split(len(pairs)))
            self._optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(self._parameters(), self._max_grad_norm)
        self._optimizer.step()
        self.losses.append(loss.item())


class ImplicitProcessReward(_Learner):
    """OPRL / iStar: the reward of a turn is beta sum_t log(pi_phi / pi_ref), phi trained in loop.

    ``logp(model, prompts, completions) -> list of (C_i,)`` gives per-token log-probs,
    differentiable in ``model``; ``reference`` stays frozen. After scoring a batch, phi takes one
    step on ``trajectory_preference_loss`` of each group: completions that ``rule`` calls right
    (> 0.5) win over those it calls wrong. Source: Tongyi-ConvAI/Tongyi-Character, ``istar``.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        logp: Callable[..., list[Tensor]],
        rule: Callable[..., list[float | None]],
        optimizer: torch.optim.Optimizer,
        *,
        group_size: int,
        beta: float = 0.05,
        max_grad_norm: float = 10.0,
        name: str = "implicit_process_reward",
    ) -> None:
        self._model, self._reference, self._logp = model, reference, logp
        self._rule, self._optimizer, self._group_size = rule, optimizer, group_size
        self._beta, self._max_grad_norm = beta, max_grad_norm
        self.name = self.__name__ = name
        self.columns = tuple(getattr(rule, "columns", ()))
        self.range = (-float("inf"), float("inf"))
        self.losses: list[float] = []

    @classmethod
    def from_trainer(
        cls, trainer: Any, rule: Callable, *, learning_rate: float = 1e-6, **options: Any
    ) -> ImplicitProcessReward:
        """Phi and its frozen start are copies of the policy; turns are read without images."""
        chats, policy = Chats(trainer), load_frozen(None, trainer)
        model, reference = _copy(policy), _copy(policy).requires_grad_(False)

        def logp(which: nn.Module, prompts: Sequence, completions: Sequence) -> list[Tensor]:
            groups = [chats.group(text_only(prompt)) for prompt in prompts]
            for group, completion in zip(groups, completions, strict=True):
                group.completions = [chats.ids(completion_text(completion))]
            return [scores.logp[0] for scores in score(which, groups)]

        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        return cls(model, reference, logp, rule, optimizer, **options)

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[float]:
        """Step rewards of this batch; then phi learns from it."""
        with torch.no_grad():
            frozen = self._logp(self._reference, prompts, completions)
        with torch.enable_grad():
            policy = self._logp(self._model, prompts, completions)
            ratios = [self._beta * (p - f) for p, f in zip(policy, frozen, strict=True)]
            values = self._rule(prompts=prompts, completions=completions, **columns)
            self._learn(ratios, values)
        return [r.detach().sum().item() for r in ratios]

    def _learn(self, ratios: list[Tensor], values: list[float | None]) -> None:
        losses = []
        for start in range(0, len(ratios), self._group_size):
            rows = [i for i in range(start, start + self._group_size) if values[i] is not None]
            won = [values[i] > 0.5 for i in rows]
            if any(won) and not all(won):
                tokens = torch.cat([ratios[i] for i in rows])
                lengths = [len(ratios[i]) for i in rows]
                losses.append(trajectory_preference_loss(tokens, lengths, rows, won))
        if not losses:
            return
        loss = torch.stack(losses).mean()
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters(), self._max_grad_norm)
        self._optimizer.step()
        self.losses.append(loss.item())


def group_pairs(texts: list[str], values: list, group_size: int) -> list[tuple[str, str]]:
    """All (right, wrong) pairs inside each group of ``group_size`` consecutive completions."""
    pairs = []
    for start in range(0, len(texts), group_size):
        rows = range(start, min(start + group_size, len(texts)))
        right = [texts[i] for i in rows if values[i] is not None and values[i] > 0.5]
        wrong = [texts[i] for i in rows if values[i] is not None and values[i] <= 0.5]
        pairs += [(r, w) for r in right for w in wrong]
    return pairs


def classifier_score(model: nn.Module, tokenizer, **options: Any) -> Callable:
    """``f(texts) -> (B,)``: ``logits[:, 0]`` of a sequence classifier of transformers."""

    def scores(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt", **options)
        return model(**batch.to(model.device)).logits[:, 0]

    return scores


def _copy(model: nn.Module) -> nn.Module:
    """A copy that computes with its own weights.

    TRL and accelerate replace ``forward`` on the instance by a function bound to the original; a
    plain deep copy would call that one.
    """
    twin = copy.deepcopy(model)
    twin.__dict__.pop("forward", None)
    return twin
