# SPDX-License-Identifier: Apache-2.0
"""Rows set aside: which, where, why; one ledger for all workers and processes of a run."""

from __future__ import annotations

import fcntl
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import orjson


@dataclass(frozen=True)
class SetAside:
    """A row that is not trained on.

    `line` counts from 1: the line of a text file, the row of a JSON array or a table. `id` is the
    row's own, if it has one.
    """

    file: str
    line: int
    id: object
    reason: str
    message: str


class Quarantine(Sequence):
    """The rows set aside so far, each (file, line) once, whoever found it.

    The ledger is a file of JSON lines, appended to under a lock: a dataloader worker or another
    process of the run that holds a copy of this object writes to the same one, and reading this
    sequence reads what all of them wrote. `path` is that file, begun anew by the first process
    (`RANK` 0 or unset); None keeps it in the temporary folder for as long as this object lives.
    """

    def __init__(self, path: str | Path | None = None):
        if path is None:
            descriptor, name = tempfile.mkstemp(prefix="fastgrpo-set-aside-", suffix=".jsonl")
            os.close(descriptor)
            weakref.finalize(self, _remove, name, os.getpid())
            self._path = Path(name)
        else:
            self._path = Path(path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if is_first_process():  # another file, not an emptied one: copies elsewhere see it
                fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
                fresh.touch()
                fresh.replace(self._path)
        self._forget()

    def add(self, *rows: SetAside) -> None:
        with self._path.open("a+b") as ledger:
            fcntl.flock(ledger, fcntl.LOCK_EX)
            self._catch_up(ledger)
            new: dict[tuple[str, int], SetAside] = {}
            for row in rows:
                new.setdefault((row.file, row.line), row)
            for key, row in new.items():
                if key not in self._seen:
                    ledger.write(orjson.dumps(asdict(row), default=str) + b"\n")
            ledger.flush()
            self._catch_up(ledger)

    def counts(self) -> dict[str, int]:
        """Rows per reason, the most frequent first."""
        return dict(Counter(row.reason for row in self).most_common())

    def __len__(self) -> int:
        return len(self._read())

    def __getitem__(self, index):
        return self._read()[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and self._read() == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self._read())

    def __deepcopy__(self, memo: dict) -> Quarantine:
        return self  # datasets copies its transforms; the ledger stays one

    def _read(self) -> list[SetAside]:
        try:
            with self._path.open("rb") as ledger:
                self._catch_up(ledger)
        except FileNotFoundError:
            self._forget()
        return self._rows

    def _catch_up(self, ledger: BinaryIO) -> None:
        """Takes over the whole lines written since this copy last looked."""
        file = os.fstat(ledger.fileno()).st_ino
        if file != self._file:
            self._forget()
            self._file = file
        ledger.seek(self._offset)
        written = ledger.read()
        written = written[: written.rfind(b"\n") + 1]
        self._offset += len(written)
        for line in written.splitlines():
            row = SetAside(**orjson.loads(line))
            if (row.file, row.line) not in self._seen:
                self._seen.add((row.file, row.line))
                self._rows.append(row)

    def _forget(self) -> None:
        self._rows: list[SetAside] = []
        self._seen: set[tuple[str, int]] = set()
        self._file, self._offset = None, 0


def is_first_process() -> bool:
    """Whether this is process 0 of the run, as torchrun and accelerate number them."""
    return int(os.environ.get("RANK", "0")) == 0


def _remove(name: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker holds the same object
        Path(name).unlink(missing_ok=True)
