# SPDX-License-Identifier: Apache-2.0
"""The rows of a data file one by one: lines of JSON, or the elements of a JSON array."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson

from fastgrpo.data.conversation import RowFault
from fastgrpo.errors import InputError

MAX_LINE_BYTES = 16 * 2**20


def read_rows(file: Path) -> Iterator[tuple[int, dict | RowFault]]:
    """(number from 1, row or what is wrong with it) for each line that is not blank.

    A file named `.json` that begins with "[" is one array, its elements the rows. Raises
    `InputError` for a file that cannot be read, or is a broken array.
    """
    try:
        with file.open("rb") as stream:
            is_array = (
                file.suffix == ".json"
                and stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
            )
            stream.seek(0)
            rows = _elements(file, stream.read()) if is_array else map(_parsed, _lines(stream))
            for number, row in enumerate(rows, 1):
                if row is not None:
                    yield number, row
    except OSError as error:
        raise InputError(f"data_file_paths: {file} cannot be read: {error}") from None


class GrowingLines:
    """The lines of a JSONL file that another process appends to, each once."""

    def __init__(self, file: Path):
        self.file, self._position, self._line = file, 0, 0

    def read(self) -> Iterator[tuple[int, dict | RowFault]]:
        """What was finished since the last call, as `read_rows` gives it."""
        with self.file.open("rb") as stream:
            stream.seek(self._position)
            new = stream.read()
        new = new[: new.rfind(b"\n") + 1]
        self._position += len(new)
        for raw in new.splitlines():
            self._line += 1
            row = _parsed(raw)
            if row is not None:
                yield self._line, row


def _elements(file: Path, data: bytes) -> Iterator[dict | RowFault]:
    try:
        return map(_object, orjson.loads(data.removeprefix(b"\xef\xbb\xbf")))
    except orjson.JSONDecodeError as error:
        raise InputError(f"data_file_paths: {file} is not a JSON array: {error}") from None


def _lines(stream) -> Iterator[bytes]:
    """Each line; an overlong one is cut one byte beyond the limit."""
    first = True
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        tail = raw
        while len(tail) > MAX_LINE_BYTES and not tail.endswith(b"\n"):
            tail = stream.readline(MAX_LINE_BYTES + 1)
        yield raw.removeprefix(b"\xef\xbb\xbf") if first else raw
        first = False


def _parsed(raw: bytes) -> dict | RowFault | None:
    if not raw.strip():
        return None
    if len(raw) > MAX_LINE_BYTES:
        return RowFault("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        return _object(orjson.loads(raw))
    except orjson.JSONDecodeError as error:
        return RowFault("bad_json", f"{error}")


def _object(row: object) -> dict | RowFault:
    if isinstance(row, dict):
        return row
    return RowFault("not_an_object", f"expected a JSON object, got {type(row).__name__}")
