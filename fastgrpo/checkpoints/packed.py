# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a package carries it: its files, the weights under LZMA."""

from __future__ import annotations

import lzma
from importlib.resources.abc import Traversable
from pathlib import Path

WEIGHTS, PACKED = "model.safetensors", "model.safetensors.xz"
# A weight is two unlike bytes: the coder is told which of them it is at (lp, pb), and the two
# highest bits of the one before (lc).
FILTERS = [{"id": lzma.FILTER_LZMA2, "lc": 2, "lp": 1, "pb": 1}]


def pack(folder: Path) -> None:
    """Puts the folder's weights under LZMA; equal weights give equal bytes."""
    weights = folder / WEIGHTS
    (folder / PACKED).write_bytes(lzma.compress(weights.read_bytes(), filters=FILTERS))
    weights.unlink()


def unpack(packed: Traversable, folder: Path) -> Path:
    """The packed checkpoint as one that loads, in `folder`, which is made; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in packed.iterdir():
        if file.name == PACKED:
            (folder / WEIGHTS).write_bytes(lzma.decompress(file.read_bytes()))
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder
