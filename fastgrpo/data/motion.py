# SPDX-License-Identifier: Apache-2.0
"""Training data that changes while training: stages in order, and a source that grows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from fastgrpo.errors import InputError


def staged(stages: Sequence, *, seed: int | None = None, epochs: Sequence[int] | None = None):
    """One `datasets.Dataset` that goes through `stages` in order, for `shuffle_dataset=False`.

    See `in_stages`. All stages need the same columns. A stage's rows can carry their own reward
    columns, such as VLM-R1's `accu_reward_method`.
    """
    from datasets import concatenate_datasets

    if not stages:
        raise InputError("stages: expected at least one dataset")
    columns = set(stages[0].column_names)
    for i, stage in enumerate(stages):
        if set(stage.column_names) != columns:
            odd = columns.symmetric_difference(stage.column_names)
            raise InputError(f"stages[{i}]: columns differ from the first stage: {sorted(odd)}")
    sizes = [len(stage) for stage in stages]
    return in_stages(concatenate_datasets(list(stages)), sizes, seed=seed, epochs=epochs)


def in_stages(
    dataset, sizes: Sequence[int], *, seed: int | None = None, epochs: Sequence[int] | None = None
):
    """`dataset`, whose first `sizes[0]` rows are stage 0 and so on, with its stages in order.

    Each stage is shuffled in itself by `seed` (None keeps its order, as RewardMap's data sorted by
    difficulty) and repeated `epochs[i]` times, shuffled anew each time.
    """
    epochs = [1] * len(sizes) if epochs is None else list(epochs)
    if len(epochs) != len(sizes):
        raise InputError(f"epochs: expected {len(sizes)} values, got {len(epochs)}")
    if any(repeats < 0 for repeats in epochs) or not any(epochs):
        raise InputError(f"epochs: expected counts of which one is above 0, got {epochs}")
    order, first = [], 0
    for i, (size, repeats) in enumerate(zip(sizes, epochs, strict=True)):
        for epoch in range(repeats):
            if seed is None:
                rows = np.arange(size)
            else:
                rows = np.random.default_rng([seed, i, epoch]).permutation(size)
            order += (first + rows).tolist()
        first += size
    return dataset.select(order)


class GrowingDataset(TorchDataset):
    """A map-style dataset whose rows may be added while a trainer reads it.

    A trainer asks for the length once, so `length` is nominal: it sets the length of an epoch, and
    index i reads row i modulo the number of rows there are by then. Rows added early are visited
    like all others. `opened` turns the row that is read into what the trainer gets. Safe for
    several threads.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        length: int,
        opened: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ):
        self._opened = opened
        self._rows = list(rows)
        self._lock = threading.Lock()
        if not self._rows:
            raise InputError("rows: a growing dataset starts with at least one row")
        if length < 1:
            raise InputError(f"length: expected at least 1, got {length}")
        self.length = length
        self.column_names = list(self._rows[0])

    def append(self, rows: Iterable[dict[str, Any]]) -> int:
        """Add rows with the columns of the first; returns how many rows there are now."""
        rows = list(rows)
        for i, row in enumerate(rows):
            if set(row) != set(self.column_names):
                raise InputError(
                    f"rows[{i}]: expected columns {self.column_names}, got {list(row)}"
                )
        with self._lock:
            self._rows += rows
            return len(self._rows)

    @property
    def num_rows(self) -> int:
        """Rows there are now."""
        with self._lock:
            return len(self._rows)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._lock:
            row = self._rows[index % len(self._rows)]
        return self._opened(row)


class DataFeed:
    """A thread that appends what a source yields: `with DataFeed(dataset, source): train()`.

    `source` yields lists of rows, such as a synthesis server's answers. It is asked for more only
    while the context is open; an error in it is raised when the context closes.
    """

    def __init__(self, dataset: GrowingDataset, source: Iterable[list[dict[str, Any]]]):
        self._dataset, self._source = dataset, source
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="fastgrpo-data-feed")

    def __enter__(self) -> DataFeed:
        self._thread.start()
        return self

    def __exit__(self, kind, value, trace) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and value is None:
            raise self._error

    def _run(self) -> None:
        try:
            for rows in self._source:
                if self._stop.is_set():
                    return
                self._dataset.append(rows)
        except BaseException as error:  # handed to the thread that closes the context
            self._error = error


def as_dataset(rows: GrowingDataset):
    """A `datasets.Dataset` of nominal length whose row i is `rows[i]` when it is read.

    It must be read in the process that holds `rows`: no dataloader workers.
    """
    from datasets import Dataset

    def read(numbers: dict[str, list[int]]) -> dict[str, list]:
        found = [rows[number] for number in numbers["number"]]
        return {name: [row[name] for row in found] for name in found[0]}

    return Dataset.from_dict({"number": range(len(rows))}).with_transform(read)
