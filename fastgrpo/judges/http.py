# SPDX-License-Identifier: Apache-2.0
"""A judge behind an OpenAI-compatible HTTP endpoint as a reward function."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import re2

from fastgrpo.errors import InputError
from fastgrpo.rewards.core.columns import row_columns, row_of
from fastgrpo.rewards.read.chat import chat_text

Messages = list[dict[str, Any]]
_NUMBER = re2.compile(r"(?:^|[^\d.])([01](?:\.\d+)?)(?:$|[^\d.]|\.(?:$|\D))")
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}


def score_between_0_and_1(reply: str) -> float | None:
    """The first number in [0, 1] that stands alone in ``reply``, or None."""
    for match in _NUMBER.finditer(reply[:4096]):
        value = float(match.group(1))
        if value <= 1.0:
            return value
    return None


class ResponseCache:
    """Replies by request on disk: one SQLite file, safe for several threads."""

    def __init__(self, path: str | Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False)
        with self._lock, self._db:
            self._db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT)")

    def get(self, key: str) -> str | None:
        """The stored reply, or None."""
        with self._lock:
            row = self._db.execute("SELECT text FROM replies WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, text: str) -> None:
        """Store a reply."""
        with self._lock, self._db:
            self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class HTTPJudge:
    """Score completions with a language model served over HTTP.

    One request a completion to ``POST {url}/chat/completions``, at most ``concurrency`` at a time,
    each with ``timeout`` seconds and ``tries`` attempts with exponential back-off from
    ``backoff`` seconds (a Retry-After header is respected up to ``timeout``). A completion whose
    request or reply fails for good scores ``fallback`` (None: not scored) and is counted in
    ``failures`` by reason. Equal requests are sent once; with ``cache`` (a file) also across runs.

    The instance is a reward function in TRL's signature. ``prefetch`` starts the requests and
    returns at once: fastgrpo's trainer calls it right after generation, so that the judge works
    while the old and reference log-probs are computed.

    Args:
        messages: ``f(prompt, completion, row) -> chat messages``; ``row`` holds the other columns.
        parse: ``f(reply) -> score or None`` (None counts as a failed reply).
        range: lowest and highest score; replies outside are clamped.
        api_key_env: environment variable with the bearer token; unset or empty sends none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        messages: Callable[[str, str, dict[str, Any]], Messages],
        *,
        parse: Callable[[str], float | None] = score_between_0_and_1,
        range: tuple[float, float] = (0.0, 1.0),
        fallback: float | None = 0.0,
        concurrency: int = 32,
        timeout: float = 30.0,
        tries: int = 3,
        backoff: float = 0.5,
        cache: str | Path | None = None,
        sampling: dict[str, Any] | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        name: str = "http_judge",
        columns: Sequence[str] = (),
    ) -> None:
        import httpx2

        if tries < 1 or concurrency < 1:
            raise InputError(f"tries, concurrency: expected at least 1, got {tries}, {concurrency}")
        key = os.environ.get(api_key_env, "")
        self._http_error = httpx2.HTTPError
        self._client = httpx2.Client(
            base_url=url.rstrip("/"),
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=concurrency),
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix=name)
        self._cache = ResponseCache(cache) if cache is not None else None
        self._pending: dict[str, Future[str | None]] = {}
        self._lock = threading.Lock()
        self._model, self._messages, self._parse = model, messages, parse
        self._sampling = {"temperature": 0.0, "max_tokens": 256} | (sampling or {})
        self._tries, self._backoff, self._timeout = tries, backoff, timeout
        self.range, self.fallback, self.columns = range, fallback, tuple(columns)
        self.name = self.__name__ = name
        self.failures: Counter[str] = Counter()

    def prefetch(self, prompts: Sequence, completions: Sequence, **columns: Any) -> None:
        """Start the requests of a batch without waiting for them."""
        for request in self._requests(prompts, completions, columns):
            self._submit(request)

    def __call__(
        self, prompts: Sequence, completions: Sequence, **columns: Any
    ) -> list[float | None]:
        """Scores in the order of ``completions``."""
        return [self._score(text) for text in self.replies(prompts, completions, **columns)]

    def replies(self, prompts: Sequence, completions: Sequence, **columns: Any) -> list[str | None]:
        """What the judge said to each completion; None where it did not answer."""
        futures = [self._submit(r) for r in self._requests(prompts, completions, columns)]
        texts = [f.result() for f in futures]
        with self._lock:
            self._pending = {k: f for k, f in self._pending.items() if not f.done()}
        return texts

    def close(self) -> None:
        """Drop queued requests, close connections and the cache."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.close()
        if self._cache is not None:
            self._cache.close()

    def _requests(self, prompts, completions, columns) -> list[bytes]:
        columns = row_columns(columns, len(completions))
        requests = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = row_of(columns, i)
            chat = self._messages(chat_text(prompt), chat_text(completion), row)
            body = {"model": self._model, "messages": chat} | self._sampling
            requests.append(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))
        return requests

    def _submit(self, request: bytes) -> Future[str | None]:
        key = hashlib.sha256(str(self._client.base_url).encode() + request).hexdigest()
        with self._lock:
            future = self._pending.get(key)
            if future is None:
                future = self._pool.submit(self._ask, key, request)
                self._pending[key] = future
            return future

    def _ask(self, key: str, request: bytes) -> str | None:
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            return known
        reason = "no reply"
        for attempt in range(self._tries):
            if attempt:
                time.sleep(min(self._backoff * 2 ** (attempt - 1), self._timeout))
            try:
                reply = self._client.post(
                    "/chat/completions",
                    content=request,
                    headers={"Content-Type": "application/json"},
                )
            except self._http_error as error:
                reason = type(error).__name__
                continue
            if reply.status_code in _RETRIED:
                reason = f"HTTP {reply.status_code}"
                self._wait_as_asked(reply.headers.get("Retry-After"))
                continue
            if reply.status_code != 200:
                reason = f"HTTP {reply.status_code}"
                break
            try:
                text = orjson.loads(reply.content)["choices"][0]["message"]["content"]
            except (orjson.JSONDecodeError, LookupError, TypeError):
                reason = "malformed reply"
                continue
            if not isinstance(text, str):
                reason = "malformed reply"
                continue
            if self._cache is not None:
                self._cache.put(key, text)
            return text
        self._count(reason)
        return None

    def _wait_as_asked(self, seconds: str | None) -> None:
        if seconds is not None and seconds.isascii() and seconds.isdigit():
            time.sleep(min(float(seconds), self._timeout))

    def _score(self, text: str | None) -> float | None:
        if text is None:
            return self.fallback
        value = self._parse(text)
        if value is None or value != value:
            self._count("unreadable reply")
            return self.fallback
        return min(max(float(value), self.range[0]), self.range[1])

    def _count(self, reason: str) -> None:
        with self._lock:
            self.failures[reason] += 1
