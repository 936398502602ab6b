# SPDX-License-Identifier: Apache-2.0
"""Reward functions that fail: named, counted, None for their samples, and nothing else changes."""

import asyncio
import functools
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from fastgrpo import InputError  # noqa: E402
from fastgrpo.integrations.trl import RewardGuard  # noqa: E402

COMPLETIONS = ["a", "b", "c"]


def call(function, guard=None, **columns):
    guard = guard or RewardGuard()
    rewards = guard.wrap(function, "fn")(prompts=["p"] * 3, completions=COMPLETIONS, **columns)
    return rewards, guard.take_counts()["fn"]


class Callable_:
    def __call__(self, completions, **columns):
        return [1.0, 2.0, 3.0]


GOOD = {
    "floats": lambda **k: [1.0, 2.0, 3.0],
    "ints and bools": lambda **k: [True, 2, 3],
    "numpy scalars": lambda **k: [np.float32(1), np.int64(2), np.bool_(True) + 2.0],
    "array": lambda **k: np.array([1.0, 2.0, 3.0]),
    "tensor": lambda **k: torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
    "tensor scalars": lambda **k: [torch.tensor(1.0), torch.tensor([2.0]), torch.tensor(3)],
    "tuple": lambda **k: (1.0, 2.0, 3.0),
    "generator": lambda **k: (float(i) for i in (1, 2, 3)),
    "callable object": Callable_(),
    "partial": functools.partial(lambda scale, **k: [scale * i for i in (1, 2, 3)], 1.0),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_trl_would_accept_passes_unchanged(case):
    assert call(GOOD[case]) == ([1.0, 2.0, 3.0], 0)


def raising(**columns):
    raise UnboundLocalError("local variable 'label'")


def broken_generator(**columns):
    yield 1.0
    raise KeyError("box")


BAD = {
    "raises": (raising, [None] * 3, "UnboundLocalError: local variable 'label'"),
    "generator": (broken_generator, [None] * 3, "KeyError: 'box'"),
    "too few": (lambda **k: [1.0, 2.0], [None] * 3, "returned 2 rewards for 3 completions"),
    "a number": (lambda **k: 1.0, [None] * 3, "returned 1 rewards for 3 completions"),
    "nothing": (lambda **k: None, [None] * 3, "returned 1 rewards for 3 completions"),
    "a text": (lambda **k: "abc", [None] * 3, "returned str, not a number"),
    "text": (lambda **k: [1.0, "0.5", 3.0], [1.0, None, 3.0], "returned str, not a number"),
    "list": (lambda **k: [1.0, [2], 3.0], [1.0, None, 3.0], "returned list, not a number"),
    "complex": (lambda **k: [1.0, 2j, 3.0], [1.0, None, 3.0], "returned complex, not a number"),
    "NaN": (lambda **k: [1.0, float("nan"), 3.0], [1.0, None, 3.0], "returned NaN"),
    "inf": (lambda **k: [float("inf"), -np.inf, 3.0], [None, None, 3.0], "an infinite value"),
    "huge": (lambda **k: [1e39, -(10**400), 3.0], [None, None, 3.0], "beyond float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_failing_function_is_named_and_its_samples_counted(case, caplog):
    function, rewards, message = BAD[case]
    assert call(function) == (rewards, rewards.count(None))
    assert "reward fn: " in caplog.text and message in caplog.text


def test_none_is_no_failure():
    assert call(lambda **k: [None, 2.0, None]) == ([None, 2.0, None], 0)


def test_each_reason_is_logged_once_and_every_failure_counted(caplog):
    guard = RewardGuard()
    for _ in range(5):
        call_guarded = guard.wrap(raising, "fn")
        call_guarded(prompts=None, completions=COMPLETIONS)
    assert len(caplog.records) == 1
    assert guard.take_counts()["fn"] == 15 and guard.take_counts()["fn"] == 0


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, SystemExit])
def test_a_wrong_call_and_an_interrupt_pass(error):
    def function(**columns):
        raise error("no")

    with pytest.raises(error):
        call(function)


def spin(**columns):
    while True:
        pass


def stubborn(**columns):
    while True:
        try:
            spin()
        except Exception:
            continue


def catastrophic_regex(**columns):
    re.match(r"(a+)+$", "a" * 40 + "b")


@pytest.mark.parametrize("function", [spin, stubborn, catastrophic_regex])
def test_a_function_that_hangs_is_stopped(function, caplog):
    start = time.monotonic()
    assert call(function, RewardGuard(timeout=0.2)) == ([None] * 3, 3)
    assert time.monotonic() - start < 60
    assert "ran longer than 0.2 s" in caplog.text


def test_a_timer_that_was_running_keeps_its_time():
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    previous = signal.setitimer(signal.ITIMER_REAL, 500.0)
    try:
        assert call(lambda **k: [1.0, 2.0, 3.0], RewardGuard(timeout=5.0))[1] == 0
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if previous[0]:
            signal.setitimer(signal.ITIMER_REAL, *previous)


def test_a_hanging_function_outside_the_main_thread_is_left_behind():
    released = threading.Event()
    results = []
    guard = RewardGuard(timeout=0.2)
    worker = threading.Thread(
        target=lambda: results.append(call(lambda **k: released.wait(60), guard))
    )
    worker.start()
    worker.join(30)
    released.set()
    assert results == [([None] * 3, 3)]


def test_async_functions_stay_async_and_are_guarded():
    async def good(**columns):
        await asyncio.sleep(0)
        return [1.0, float("nan"), 3.0]

    async def bad(**columns):
        raise ConnectionError("judge is down")

    async def slow(**columns):
        await asyncio.sleep(60)

    guard = RewardGuard(timeout=0.2)
    wrapped = [guard.wrap(f, f.__name__) for f in (good, bad, slow)]
    assert all(asyncio.iscoroutinefunction(f) for f in wrapped)

    async def gather():
        return await asyncio.gather(*(f(prompts=None, completions=COMPLETIONS) for f in wrapped))

    assert asyncio.run(gather()) == [[1.0, None, 3.0], [None] * 3, [None] * 3]
    assert guard.take_counts() == {"good": 1, "bad": 3, "slow": 3}


def test_columns_reach_the_function():
    seen = {}
    call(lambda **k: seen.update(k) or [0, 0, 0], solution=["x", "y", "z"])
    assert seen["solution"] == ["x", "y", "z"] and seen["prompts"] == ["p"] * 3


def test_a_call_in_any_form_is_answered_as_the_bare_function_answers_it():
    """TRL's own tests call a reward that an environment owns with the environments alone."""

    class Environment:
        def get_reward(self):
            return 2.5

    def owned(environments, **columns):
        return [environment.get_reward() for environment in environments]

    async def owned_async(environments, **columns):
        return owned(environments)

    guard = RewardGuard()
    two = [Environment(), Environment()]
    assert guard.wrap(owned)(environments=two) == [2.5, 2.5]
    assert guard.wrap(owned)(two) == [2.5, 2.5]
    assert asyncio.run(guard.wrap(owned_async)(environments=two)) == [2.5, 2.5]
    assert guard.wrap(owned)(environments=[two[0], None]) == [None, None]
    assert guard.take_counts() == {"owned": 2}
    assert guard.wrap(lambda scale=2: [1.0 * scale])() == [2.0]
    with pytest.raises(ZeroDivisionError):  # with no sample to set aside there is no other answer
        guard.wrap(lambda: 1 / 0)()


def test_only_a_first_batch_that_fails_whole_stops_the_run():
    def guard_after(*failures):
        guard = RewardGuard()
        guard.wrap(raising, "fn")(completions=COMPLETIONS)
        for failed in failures:
            guard.check_first_call(failed, 3)

    with pytest.raises(InputError, match="fn failed for all 3 samples.*UnboundLocalError"):
        guard_after({"good": 0.0, "fn": 3.0})
    guard_after({"fn": 2.0}, {"fn": 3.0})
    guard_after({"fn": 0.0}, {"fn": 3.0})
