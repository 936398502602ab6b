# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder's own list of its files, and the file that names the newest checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MANIFEST, LATEST = "manifest.json", "latest"


def write_manifest(folder: Path) -> None:
    """Syncs every file of `folder` to disk and writes their sizes and SHA-256, itself last."""
    entries = {}
    for path in _files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    _write(folder / MANIFEST, json.dumps(entries, indent=1))
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        sync_folder(path)


def differs_from_manifest(folder: Path) -> str | None:
    """The first file that is not as the manifest has it; None if all are."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is cut short"
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {size}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{name} is not the file that was saved"
    return None


def publish(checkpoint: Path) -> None:
    """Points `latest`, beside the checkpoint, at it, in one step."""
    pointer = checkpoint.parent / LATEST
    _write(pointer.with_suffix(".tmp"), checkpoint.name)
    pointer.with_suffix(".tmp").replace(pointer)
    sync_folder(checkpoint.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
