# SPDX-License-Identifier: Apache-2.0
"""What is asked of the rewards before and while a run begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.check import (
    Verdict,
    check_truth,
    has_truth,
    parts_of,
    refuse_unstated,
)

logger = logging.getLogger(__name__)
WATCHED = 10  # training batches after which a reward that never moved is named


class FirstBatches:
    """The truth check of the first training batch, and the watch on the first `WATCHED`."""

    def __init__(self) -> None:
        self._asked = False
        self._seen = 0
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def ask_truth(
        self, functions: Sequence[Callable], rows: Sequence[dict], group_size: int, state: Any
    ) -> None:
        """Each reward scores answers made from the solutions of the first batch, once.

        Raises `InputError` with the row, the value and the frames when one is not paid the top,
        when most solutions do not fit the frame they are said to be in, or when nobody says which
        frame the answers are in.
        Rewards without an answer to make are named in one line. Rows that are not scored at all
        are left to the reward guard.
        """
        if self._asked or not rows:
            return
        self._asked = True
        parts = [part for function in functions for part in parts_of(function)]
        columns = {key: [row.get(key) for row in rows] for key in rows[0]}
        distinct = range(0, len(rows), 1 if len(rows) % group_size else group_size)
        for part in parts:
            refuse_unstated(part, columns, len(rows))
        for part in filter(has_truth, parts):
            _judge(check_truth(part, columns, distinct, trainer_state=state))
        unasked = [getattr(part, "__name__", repr(part)) for part in parts if not has_truth(part)]
        if unasked:
            logger.info("no answer can be made to check: %s", ", ".join(unasked))

    def watch(self, rewards: Tensor, names: Sequence[str]) -> None:
        """One warning per reward that had one value only in the first batches.

        `rewards` (B, F), NaN where not scored, one column per name.
        """
        if self._seen >= WATCHED:
            return
        self._seen += 1
        low = rewards.masked_fill(rewards.isnan(), torch.inf).amin(0)
        high = rewards.masked_fill(rewards.isnan(), -torch.inf).amax(0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        if self._seen < WATCHED:
            return
        for name, lowest, highest in zip(names, self._low, self._high, strict=True):
            if lowest == highest:
                logger.warning(
                    "reward %s was %.4g for every completion of the first %d batches and teaches "
                    "nothing. Usual causes: the prompt does not ask for the format that is read, "
                    "completions are cut at max_completion_length, sampling is too cold to vary, "
                    "boxes are read in another frame than the model writes, the solution column "
                    "is another one.",
                    name, lowest.item(), WATCHED,
                )  # fmt: skip


def _judge(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        if verdict.fault is not None and verdict.value is not None:
            raise _stop(verdict, f"fails its own truth: {verdict.fault}")
    doubted = [verdict for verdict in verdicts if verdict.doubt is not None]
    if 2 * len(doubted) > len(verdicts):
        raise _stop(doubted[0], f"is given solutions in another frame: {doubted[0].doubt}")
    for verdict in doubted:
        logger.warning("reward %s, row %d: %s", verdict.reward, verdict.row, verdict.doubt)


def _stop(verdict: Verdict, what: str) -> InputError:
    return InputError(
        f"reward {verdict.reward!r} {what}, in row {verdict.row} of the first batch "
        f"({verdict.frames}); the answer made from the solution was {verdict.answer:.500}, paid "
        f"{verdict.value:.4g}. State the frame of the solution or of the answer (solution_frame, "
        "answer_frame: columns, or settings of the reward), or mend the row"
    )
