# SPDX-License-Identifier: Apache-2.0
"""Rewards that need a second rollout depending on the first: re-answer, reason from a caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastgrpo.errors import InputError
from fastgrpo.judges.bound import Chats, load_frozen
from fastgrpo.packing import Group
from fastgrpo.rewards.core.columns import row_columns, row_of
from fastgrpo.rewards.read.chat import completion_text
from fastgrpo.rewards.read.tags import between
from fastgrpo.rollout import generate


class SecondPass:
    """Sample once more from what a completion said, and score that.

    `prompt(completion, row) -> Group | None` builds the second prompt, without images for
    Vision-SR1 (the policy answers from its own description) and RACRO (a frozen reasoner answers
    from the caption); None: the completion gave nothing to go on and gets `missing`. The second
    completions are decoded and scored by `reward`, whose columns are those of the first row.

    `model` None takes the policy as it is at that step (the trainer is handed in by `bind`).
    Sampling settings are those of `generate`; temperature 0 is greedy.
    """

    def __init__(
        self,
        prompt: Callable[[Any, dict[str, Any]], Group | None],
        reward: Callable,
        decode: Callable[[list[int]], str],
        *,
        model=None,
        missing: float | None = 0.0,
        max_new_tokens: int = 512,
        name: str = "second_pass",
        **sampling: Any,
    ):
        self.prompt, self.reward, self.decode, self.model = prompt, reward, decode, model
        self.missing, self.max_new_tokens, self.sampling = missing, max_new_tokens, sampling
        self.name = self.__name__ = name
        self.columns = tuple(getattr(reward, "columns", ()))
        self.range = getattr(reward, "range", (-float("inf"), float("inf")))
        self.texts: list[str | None] = []

    @classmethod
    def from_trainer(
        cls, trainer: Any, chat: Callable[[str, dict], str], reward: Callable, *,
        extract: str | None = None, model: str | None = None, **options: Any,
    ) -> SecondPass:  # fmt: skip
        """The second prompt is `chat(content, row)`, one user turn in the trainer's template.

        `content` is what stands in the tag `extract` of the completion (None: all of it). `model`
        names a frozen model; without one the policy answers.
        """
        chats = Chats(trainer)

        def prompt(completion: Any, row: dict[str, Any]) -> Group | None:
            content = completion_text(completion)
            if extract is not None:
                content = between(content, f"<{extract}>", f"</{extract}>")
            if not content:
                return None
            return chats.group([{"role": "user", "content": chat(content, row)}])

        frozen = load_frozen(model, trainer)
        return cls(prompt, reward, chats.text, model=frozen, **options)

    def bind(self, trainer: Any) -> None:
        """Use the trainer's policy unless a model was given."""
        if self.model is None:
            self.model = load_frozen(None, trainer)

    def __call__(
        self, prompts: Sequence, completions: Sequence, **columns: Any
    ) -> list[float | None]:
        """The inner reward of each second completion; `texts` keeps what was said."""
        if self.model is None:
            raise InputError(f"{self.name}: model: none given and no trainer bound")
        size = len(completions)
        lists = row_columns(columns, size)
        others = {k: v for k, v in columns.items() if k not in lists}
        rows = [row_of(lists, i) for i in range(size)]
        groups = [self.prompt(c, row) for c, row in zip(completions, rows, strict=True)]
        asked = [i for i, group in enumerate(groups) if group is not None]
        answers = generate(
            self.model,
            [groups[i] for i in asked],
            1,
            max_new_tokens=self.max_new_tokens,
            **self.sampling,
        )
        self.texts = [None] * size
        rewards: list[float | None] = [self.missing] * size
        if not asked:
            return rewards
        for i, group in zip(asked, answers, strict=True):
            self.texts[i] = self.decode(group.completions[0].tolist())
        second = [[{"role": "assistant", "content": self.texts[i]}] for i in asked]
        given = {k: [v[i] for i in asked] for k, v in lists.items()}
        scored = self.reward(
            prompts=[prompts[i] for i in asked], completions=second, **given, **others
        )
        for i, value in zip(asked, scored, strict=True):
            rewards[i] = value
        return rewards
