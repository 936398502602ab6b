# SPDX-License-Identifier: Apache-2.0
"""A JSONL file that grows while a trainer reads it, such as one a synthesis server appends to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgrpo.data.files import GrowingLines
from fastgrpo.data.motion import DataFeed, GrowingDataset, as_dataset
from fastgrpo.data.opened import OpenImages
from fastgrpo.data.quarantine import Quarantine, SetAside
from fastgrpo.data.vlm_r1 import RowReader
from fastgrpo.errors import InputError


def load_growing(
    reader: RowReader,
    length: int,
    *,
    quarantine_file: str | Path | None = None,
    seconds: float = 1.0,
):
    """(a `datasets.Dataset` of nominal `length`, the `DataFeed` that lets it grow).

    Row i is row i modulo the rows there are when it is read: those of the file at the start, and
    while the feed is open whatever is appended, looked for every `seconds`. Broken rows are set
    aside as `load_vlm_r1` does. Raises `InputError` for a file without a usable row.
    """
    quarantine, lines = Quarantine(quarantine_file), GrowingLines(reader.file)
    rows = _new_rows(reader, lines, quarantine)
    if not rows:
        raise InputError(f"data_file_paths: {reader.file} has no usable row to start with")
    opened = OpenImages(quarantine, reader.max_image_pixels, "image_path")

    def open_row(row: dict[str, Any]) -> dict[str, Any]:
        columns = opened({name: [value] for name, value in row.items()})
        return {name: value for name, (value,) in columns.items()}

    growing = GrowingDataset(rows, length, open_row)

    def appended() -> Iterator[list[dict[str, Any]]]:
        while True:
            found = _new_rows(reader, lines, quarantine)
            yield [dict.fromkeys(growing.column_names) | row for row in found]
            time.sleep(seconds)

    dataset = as_dataset(growing)
    dataset.quarantined = quarantine
    return dataset, DataFeed(growing, appended())


def _new_rows(reader: RowReader, lines: GrowingLines, quarantine: Quarantine) -> list[dict]:
    read = [reader.read(line, row) for line, row in lines.read()]
    quarantine.add(*(row for row in read if isinstance(row, SetAside)))
    return [row for row in read if not isinstance(row, SetAside)]
