# SPDX-License-Identifier: Apache-2.0
"""Mathematical equality of two answers, decided in processes that are killed when they hang.

SymPy can hang, exhaust memory or crash on short text such as `9^9^9^9`; signals work in the main
thread only, so time limits need another process.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

WORKER = Path(__file__).with_name("math_worker.py")
CACHE_SIZE = 8192
# A worker that does not even report a time-out within this many seconds is replaced.
GRACE = 20.0


class Verdict(NamedTuple):
    """equal, and the reason when it could not be decided: timeout, memory, crash or an error."""

    equal: bool
    reason: str | None = None


class MathPool:
    """Worker processes; `verify` is safe to call from any thread and after a fork."""

    def __init__(self, workers: int = 2, timeout: float = 1.0, memory_mb: int = 64):
        self.workers, self.timeout, self.memory_mb = workers, timeout, memory_mb
        self._lock, self._cache, self._pid = threading.Lock(), OrderedDict(), None
        self._idle: list[subprocess.Popen] = []

    def verify(self, pairs: Sequence[tuple[str, str]], style: str = "default") -> list[Verdict]:
        """For each (a, b): whether math-verify finds them equal. Order matters to math-verify."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._idle = os.getpid(), []
            keys = [(style, a, b) for a, b in pairs]
            todo = [key for key in dict.fromkeys(keys) if key not in self._cache]
            self._run(todo)
            verdicts = [self._cache[key] for key in keys]
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
            return verdicts

    def close(self) -> None:
        if self._pid != os.getpid():
            return
        for worker in self._idle:
            worker.stdin.close()
            worker.kill()
            worker.wait()
            worker.stdout.close()
        self._idle = []

    def _run(self, todo: list[tuple[str, str, str]]) -> None:
        while len(self._idle) < min(self.workers, len(todo)):
            self._idle.append(self._start())
        waiting = list(reversed(todo))
        with selectors.DefaultSelector() as selector:
            busy = {}
            for worker in self._idle[: len(todo)]:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                busy[worker] = self._send(worker, waiting.pop())
            while busy:
                ready = selector.select(self.timeout + GRACE)
                # Workers run in parallel, so silence means that all busy ones are stuck.
                done = [key.data for key, _ in ready] or list(busy)
                for worker in done:
                    key, line = busy.pop(worker), worker.stdout.readline() if ready else b""
                    if line:
                        self._cache[key] = _verdict(json.loads(line))
                    else:
                        self._cache[key] = Verdict(False, "crash")
                        selector.unregister(worker.stdout)
                        worker = self._replace(worker)
                        selector.register(worker.stdout, selectors.EVENT_READ, worker)
                    if waiting:
                        busy[worker] = self._send(worker, waiting.pop())

    def _send(self, worker, key):
        style, a, b = key
        request = {"a": a, "b": b, "style": style, "timeout": self.timeout}
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        return key

    def _start(self) -> subprocess.Popen:
        # Without CUDA libraries, proxies or secrets: the worker needs its Python and no more.
        worker = subprocess.Popen(
            [sys.executable, "-I", str(WORKER), str(self.memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"},
            bufsize=0,
        )
        worker.stdout.readline()  # ready
        return worker

    def _replace(self, worker: subprocess.Popen) -> subprocess.Popen:
        worker.kill()
        worker.wait()
        worker.stdin.close()
        worker.stdout.close()
        self._idle.remove(worker)
        self._idle.append(self._start())
        return self._idle[-1]


def _verdict(reply: dict) -> Verdict:
    return Verdict(reply.get("equal", False), reply.get("error"))


_pool = MathPool()
atexit.register(lambda: _pool.close())


def configure(workers: int = 2, timeout: float = 1.0, memory_mb: int = 64) -> None:
    """Replace the pool: worker processes, seconds per answer, megabytes an answer may allocate."""
    global _pool
    _pool.close()
    _pool = MathPool(workers, timeout, memory_mb)


def verify(pairs: Sequence[tuple[str, str]], style: str = "default") -> list[Verdict]:
    return _pool.verify(pairs, style)


_asked = threading.local()


def equal(a: str, b: str, style: str = "default") -> Verdict:
    questions = getattr(_asked, "questions", None)
    if questions is not None:
        questions.setdefault(style, []).append((a, b))
        return Verdict(False, "collected")
    return _pool.verify([(a, b)], style)[0]


@contextmanager
def together():
    """Inside, `equal` only notes what it is asked; at the end all of it is verified in parallel.

    Rewards written row by row run once inside and then again, when every answer is known.
    """
    _asked.questions = questions = {}
    try:
        yield
    finally:
        _asked.questions = None
    for style, pairs in questions.items():
        _pool.verify(pairs, style)
