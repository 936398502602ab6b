# SPDX-License-Identifier: Apache-2.0
"""Several data files and how much of each: all, first:N, end:N or random:N, N a number or a share.

Source of the words: the YAML lists of om-ai-lab/VLM-R1's `grpo_rec.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fastgrpo.errors import InputError

ALL, WAYS = "all", ("first", "end", "random")


def read_mixture(path: Path) -> tuple[list[str], list[str]]:
    """(files, how much of each) of a YAML list `datasets: [{json_path, sampling_strategy}]`."""
    try:
        entries = yaml.safe_load(path.read_text("utf-8"))["datasets"]
        files = [str(entry["json_path"]) for entry in entries]
        shares = [str(entry.get("sampling_strategy", ALL)) for entry in entries]
    except OSError as error:
        raise InputError(f"dataset_name: {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        raise InputError(
            f"dataset_name: {path} must hold `datasets`, a list with a json_path in each entry"
        ) from None
    return files, shares


def sampled(rows: Iterable[Any], share: str, seed: int) -> Iterator[Any]:
    """The rows that `share` names, in their order; a random choice is that of `seed`.

    A percentage is rounded up. Raises `InputError` for words that are none of these.
    """
    if share == ALL:
        yield from rows
        return
    way, _, count = share.partition(":")
    digits = count.removesuffix("%")
    if way not in WAYS or not (digits.isascii() and digits.isdigit()):
        raise InputError(
            f"data_sampling: expected all, first:N, end:N or random:N (N may be 5%), got {share!r}"
        )
    rows = list(rows)
    number = math.ceil(int(digits) * len(rows) / 100) if count.endswith("%") else int(digits)
    number = min(number, len(rows))
    if way == "random":
        kept = sorted(random.Random(seed).sample(range(len(rows)), number))
        yield from (rows[i] for i in kept)
    else:
        yield from rows[:number] if way == "first" else rows[len(rows) - number :]
