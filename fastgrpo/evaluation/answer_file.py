# SPDX-License-Identifier: Apache-2.0
"""The answers of one checkpoint on disk: appended a batch at a time, read again by the next run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from fastgrpo.errors import InputError
from fastgrpo.evaluation.answers import Answer


class AnswerFile:
    """`path` holds its settings in the first line and one answer in each other; a line that was cut
    off is dropped.

    Raises `InputError` naming the first setting that differs from that of the answers there.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.settings = path, dict(settings)
        self.answers: dict[int, Answer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            path.write_bytes(orjson.dumps({"settings": self.settings}) + b"\n")
            return
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        first, *lines = whole.splitlines()
        self._check(first)
        for line in lines:
            try:
                entry = orjson.loads(line)
                row = entry.pop("row")
                self.answers[row] = Answer(**entry)
            except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"out: {path} is not a file of answers: {error}") from None

    def _check(self, first: bytes) -> None:
        try:
            settings = orjson.loads(first)["settings"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"out: {self.path} is not a file of answers") from None
        for name in dict.fromkeys([*self.settings, *settings]):
            old, new = settings.get(name), self.settings.get(name)
            if old != new:
                raise InputError(
                    f"out: {self.path} holds answers with another {name}: {old!r:.120} there, "
                    f"{new!r:.120} now; choose another folder, or remove the file"
                )

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Appends answers by row, those already there left out; all of them in one write."""
        new = {row: answer for row, answer in answers.items() if row not in self.answers}
        lines = (orjson.dumps({"row": r} | dataclasses.asdict(a)) + b"\n" for r, a in new.items())
        with self.path.open("ab") as file:
            file.write(b"".join(lines))
        self.answers |= new
