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

import numpy as np
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from fastgrpo.errors import InputError

logger = logging.getLogger(__name__)
MAX_REWARD = torch.finfo(torch.float32).max


class _TimeOut(BaseException):
    """Not an Exception: a reward function that swallows those must not swallow its own limit."""


class RewardGuard:
    """Wraps reward functions; a failed sample gets the reward None.

    TRL leaves None out of the group's statistics, and the sample's advantage is exactly 0. A call
    that raises, runs longer than `timeout` seconds or returns another number of rewards fails for
    all its samples; a value that is not a number, NaN, or beyond float32 fails for its own sample.
    Each (function, reason) is logged once; `take_counts` gives the samples failed per function
    since it was last called. `InputError` passes (the call itself is wrong: a column is missing),
    as do `KeyboardInterrupt` and `SystemExit`.
    """

    def __init__(self, timeout: float | None = None):
        self.timeout = timeout
        self._counts: Counter[str] = Counter()
        self._logged: set[tuple[str, str]] = set()

    def wrap(self, function: Callable, name: str | None = None) -> Callable:
        """The guarded function, async if `function` is."""
        name = name or get_callable_name(function)

        async def guarded_async(*args, **kwargs):
            try:
                rewards = _listed(await asyncio.wait_for(function(*args, **kwargs), self.timeout))
            except InputError:
                raise
            except TimeoutError as error:
                return self._fail_all(name, str(error) or self._limit(), kwargs)
            except Exception as error:
                return self._fail_all(name, f"{type(error).__name__}: {error}", kwargs)
            return self._check(name, rewards, len(kwargs["completions"]))

        def guarded(*args, **kwargs):
            try:
                rewards = _run_within(self.timeout, lambda: _listed(function(*args, **kwargs)))
            except InputError:
                raise
            except _TimeOut:
                return self._fail_all(name, self._limit(), kwargs)
            except Exception as error:
                return self._fail_all(name, f"{type(error).__name__}: {error}", kwargs)
            return self._check(name, rewards, len(kwargs["completions"]))

        wrapper = guarded_async if is_async_callable(function) else guarded
        if hasattr(function, "__name__"):
            functools.update_wrapper(wrapper, function)
        wrapper.__name__ = name
        return wrapper

    def count(self, name: str, reason: str, num_samples: int = 1) -> None:
        """Counts failed samples; the reason is logged the first time."""
        self._counts[name] += num_samples
        if (name, reason) not in self._logged:
            self._logged.add((name, reason))
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

    def _limit(self) -> str:
        return f"ran longer than {self.timeout} s"

    def _fail_all(self, name: str, reason: str, kwargs: dict) -> list[None]:
        num_samples = len(kwargs["completions"])
        self.count(name, reason, num_samples)
        return [None] * num_samples

    def _check(self, name: str, rewards: list, num_samples: int) -> list[float | None]:
        if len(rewards) != num_samples:
            self.count(
                name, f"returned {len(rewards)} rewards for {num_samples} completions", num_samples
            )
            return [None] * num_samples
        return [self._number(name, value) for value in rewards]

    def _number(self, name: str, value: object) -> float | None:
        if value is None:
            return None
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, numbers.Real | np.bool_):
            self.count(name, f"returned {type(value).__name__}, not a number")
        elif abs(value) > MAX_REWARD:  # before isnan, which cannot take a huge integer
            self.count(name, "returned a value beyond float32")
        elif math.isnan(value):
            self.count(name, "returned NaN")
        else:
            return float(value)
        return None


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
