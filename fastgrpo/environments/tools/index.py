# SPDX-License-Identifier: Apache-2.0
"""Search over documents at hand: BM25 over words.

score(q, d) = sum over the words t of q of
              log(1 + (n - n_t + 1/2) / (n_t + 1/2)) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean))

with n documents, n_t of them with t, f the times t stands in d. Source: Robertson and Zaragoza,
"The Probabilistic Relevance Framework: BM25 and Beyond", 2009; k1 = 1.5, b = 0.75.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fastgrpo.errors import InputError

K1, B = 1.5, 0.75
MAX_QUERY = 512


class Document(NamedTuple):
    """One page: its name, its words, and its picture where it has one."""

    id: str
    text: str
    image: Any = None


class Index:
    """Documents and the words in them."""

    def __init__(self, documents: Sequence[Document]):
        self.documents = list(documents)
        counts = [Counter(_words(document.text)) for document in documents]
        self._lengths = [sum(count.values()) for count in counts]
        self._mean = sum(self._lengths) / max(len(documents), 1)
        self._holding: dict[str, list[tuple[int, int]]] = {}
        for i, count in enumerate(counts):
            for word, times in count.items():
                self._holding.setdefault(word, []).append((i, times))

    @classmethod
    def of_rows(cls, rows: Sequence[dict[str, Any]]) -> Index:
        """From mappings with `id`, `text` and, where there is a picture, `image`."""
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or "id" not in row:
                raise InputError(f"documents: document {i} has no 'id'")
        return cls([Document(str(r["id"]), r.get("text") or "", r.get("image")) for r in rows])

    @classmethod
    def of_file(cls, path: str) -> Index:
        """From a file of one JSON mapping a line; relative `image` paths are beside the file."""
        return _read(str(Path(path).resolve()))

    def search(self, query: str, limit: int) -> list[Document]:
        """At most `limit` documents with a word of the query, best first, ties in order."""
        scores: dict[int, float] = {}
        n = len(self.documents)
        for word in _words(query[:MAX_QUERY]):
            holding = self._holding.get(word, ())
            rare = math.log(1 + (n - len(holding) + 0.5) / (len(holding) + 0.5))
            for i, times in holding:
                long = K1 * (1 - B + B * self._lengths[i] / self._mean)
                scores[i] = scores.get(i, 0.0) + rare * times * (K1 + 1) / (times + long)
        best = sorted(scores, key=lambda i: (-scores[i], i))
        return [self.documents[i] for i in best[:limit]]


@lru_cache(maxsize=8)
def _read(path: str) -> Index:
    folder, rows = Path(path).parent, []
    try:
        lines = Path(path).read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"index: {path} is not a file of JSON lines: {error}") from error
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("image"), str):
            row["image"] = str(folder / row["image"])
    return Index.of_rows(rows)


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
