# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a run can be resumed: the newest one that is whole."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path

from fastgrpo.checkpoints.manifest import MANIFEST, differs_from_manifest


def newest_complete(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest complete `checkpoint-N`, and the newer ones passed over with what they lack."""
    found = [
        (int(match[1]), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-([0-9]+)", path.name)) and path.is_dir()
    ]
    skipped: list[tuple[Path, str]] = []
    for step, path in sorted(found, reverse=True):
        fault = fault_of(path, step)
        if fault is None:
            return path, skipped
        skipped.append((path, fault))
    return None, skipped


def fault_of(checkpoint: Path, step: int | None = None) -> str | None:
    """What is missing from a checkpoint folder, or None if all of it can be loaded.

    A folder with a manifest is compared with it, file by file. In another, written by
    transformers alone, trainer_state.json comes last; weights and optimizer states are checked
    for truncation, their values are not read.
    """
    if (checkpoint / MANIFEST).is_file():
        fault = differs_from_manifest(checkpoint)
        if fault is not None:
            return fault
    state = checkpoint / "trainer_state.json"
    try:
        written = json.loads(state.read_text())
    except FileNotFoundError:
        return f"{state.name} is missing"
    except ValueError:
        return f"{state.name} is cut short"
    if not isinstance(written, dict) or (step is not None and written.get("global_step") != step):
        return f"{state.name} is not of step {step}"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    others = [p for p in files if p.suffix in (".bin", ".distcp") and p.name != "training_args.bin"]
    if not weights and not others:
        return "no weights"
    for index in checkpoint.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except ValueError:
            return f"{index.name} is cut short"
        absent = sorted(shards - {path.name for path in weights})
        if absent:
            return f"{absent[0]} is missing"
    for path in weights:
        if path.stat().st_size != _declared_size(path):
            return f"{path.name} is cut short"
    for path in files:
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
    return None


def _declared_size(path: Path) -> int | None:
    """The size a safetensors file's own header declares; None if even the header is cut short."""
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return None
        length = struct.unpack("<Q", prefix)[0]
        if length > path.stat().st_size:
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)
