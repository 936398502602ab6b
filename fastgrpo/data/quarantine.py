"""Rows set aside: which, where, why; kept in memory and, if a path is given, as JSON lines."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson


@dataclass(frozen=True)
class SetAside:
    """A row that is not trained on. `line` counts from 1; `id` is the row's own, if it has one."""

    file: str
    line: int
    id: object
    reason: str
    message: str


class Quarantine:
    """Collects the rows set aside, each (file, line) once."""

    def __init__(self, path: str | Path | None = None):
        self.rows: list[SetAside] = []
        self._seen: set[tuple[str, int]] = set()
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(b"")

    def add(self, row: SetAside) -> None:
        if (row.file, row.line) in self._seen:
            return
        self._seen.add((row.file, row.line))
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("ab") as report:
                report.write(orjson.dumps(asdict(row), default=str) + b"\n")

    def counts(self) -> dict[str, int]:
        """Rows per reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.rows).most_common())
