# SPDX-License-Identifier: Apache-2.0
"""Reward functions that cannot end a run: what fails is named, counted, and leaves the baseline."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import numbers
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from fastgrpo.errors import InputError

logger = logging.getLogger(__name__)
MAX_REWARD = torch.finfo(torch.float32).max
INFINITE = "returned an infinite value"


class _TimeOut(BaseException):
    """Not an Exception: a reward function that swallows those must not swallow its own limit."""


class RewardGuard:
    """Wraps reward functions; a failed sample gets the reward None.

    TRL leaves None out of the group's statistics, and the sample's advantage is exactly 0. A call
    that raises, runs longer than `timeout` seconds or returns another number of rewards fails for
    all its samples; a value that is not a number, NaN, infinite or beyond float32 fails for its own
    sample. A call has as many samples as `completions`, or as the first list it is given; one
    without any list is passed on as it is. Each (function, reason) is logged once; `take_counts`
    gives the samples failed per function since it was last called. `InputError` passes (the call
    itself is wrong: a column is missing), as do `KeyboardInterrupt` and `SystemExit`.
    """

    def __init__(self, timeout: float | None = None):
        self.timeout = timeout
        self._counts: Counter[str] = Counter()
        self._reasons: dict[str, list[str]] = {}
        self._called = False

    def wrap(self, function: Callable, name: str | None = None) -> Callable:
        """The guarded function, async if `function` is."""
        name = name or get_callable_name(function)

        async def guarded_async(*args, **kwargs):
            with self._failures(name, args, kwargs) as call:
                call.rewards = _listed(
                    await asyncio.wait_for(function(*args, **kwargs), self.timeout)
                )
            return call.rewards

        def guarded(*args, **kwargs):
            with self._failures(name, args, kwargs) as call:
                call.rewards = _run_within(self.timeout, lambda: _listed(function(*args, **kwargs)))
            return call.rewards

        wrapper = guarded_async if is_async_callable(function) else guarded
        if hasattr(function, "__name__"):
            functools.update_wrapper(wrapper, function)
        wrapper.__name__ = name
        return wrapper

    @contextmanager
    def _failures(self, name: str, args: tuple, kwargs: dict):
        """Inside, a call sets `rewards`; afterwards they are checked, or None for what failed."""
        call = SimpleNamespace(rewards=None)
        num_samples = _num_samples(args, kwargs)
        try:
            yield call
        except InputError:
            raise
        except _TimeOut:
            if num_samples is None:
                raise TimeoutError(self._limit()) from None
            reason = self._limit()
        except Exception as error:
            if num_samples is None:
                raise
            silent = isinstance(error, TimeoutError) and not str(error)  # asyncio's own
            reason = self._limit() if silent else f"{type(error).__name__}: {error}"
        else:
            if num_samples in (None, len(call.rewards)):
                call.rewards = [self._number(name, value) for value in call.rewards]
                return
            reason = f"returned {len(call.rewards)} rewards for {num_samples} completions"
        self.count(name, reason, num_samples)
        call.rewards = [None] * num_samples

    def _limit(self) -> str:
        return f"ran longer than {self.timeout} s"

    def count(self, name: str, reason: str, num_samples: int = 1) -> None:
        """Counts failed samples; the reason is logged the first time."""
        self._counts[name] += num_samples
        self.log(name, reason, num_samples)

    def log(self, name: str, reason: str, num_samples: int) -> None:
        """Logs a reason the first time it comes."""
        known = self._reasons.setdefault(name, [])
        if reason not in known:
            known.append(reason)
            logger.warning(
                "reward %s: %s; the reward of %d sample(s) is None, their advantage 0. "
                "Later failures of this kind are counted in fastgrpo/reward_errors/%s only.",
                name,
                reason,
                num_samples,
                name,
            )

    def take_counts(self) -> Counter[str]:
        counts, self._counts = self._counts, Counter()
        return counts

    def check_first_call(self, failed: dict[str, float], num_samples: int) -> None:
        """`InputError` if a function failed for every sample of the first batch it was given.

        (A misspelt column fails for all samples of all batches, and a run would train on nothing.)
        `failed`: samples failed per function, over all processes.
        """
        if self._called:
            return
        self._called = True
        for name, count in failed.items():
            if count >= num_samples > 0:
                reasons = "; ".join(self._reasons.get(name, ["on another process"]))
                raise InputError(
                    f"reward {name} failed for all {num_samples} samples of its first batch "
                    f"({reasons}): nothing could be learnt from it"
                )

    def _number(self, name: str, value: object) -> float | None:
        if value is None:
            return None
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, numbers.Real | np.bool_):
            self.count(name, f"returned {type(value).__name__}, not a number")
        elif value in (math.inf, -math.inf):
            self.count(name, INFINITE)
        elif abs(value) > MAX_REWARD:  # before isnan, which cannot take a huge integer
            self.count(name, "returned a value beyond float32")
        elif math.isnan(value):
            self.count(name, "returned NaN")
        else:
            return float(value)
        return None


def _num_samples(args: tuple, kwargs: dict) -> int | None:
    given = (kwargs.get("completions"), *args, *kwargs.values())
    return next((len(value) for value in given if isinstance(value, list | tuple)), None)


def _listed(rewards: object) -> list:
    """What a function returned as a list; a lone value is a list of one, to fail by its length."""
    if isinstance(rewards, torch.Tensor | np.ndarray):
        rewards = rewards.tolist()
    return list(rewards) if isinstance(rewards, Iterable) else [rewards]


def _run_within(timeout: float | None, call: Callable[[], list]) -> list:
    """Calls; raises `_TimeOut` after `timeout` seconds.

    In the main thread a timer signal interrupts the call, also inside a regular expression.
    Elsewhere, where Python delivers no signals, it runs in a daemon thread that is abandoned.
    """
    if timeout is None:
        return call()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _alarm(timeout):
            return call()
    outcome: dict[str, object] = {}

    def run():
        try:
            outcome["value"] = call()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise _TimeOut
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


@contextmanager
def _alarm(seconds: float):
    """Raises `_TimeOut` after `seconds`; a timer that was running keeps its own time."""

    def interrupt(*_):
        raise _TimeOut

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if delay:
            left = max(1e-3, delay - (time.monotonic() - start))
            signal.setitimer(signal.ITIMER_REAL, left, interval)
