# SPDX-License-Identifier: Apache-2.0
"""Images opened when a row is read: the last step of every dataset made here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastgrpo.data.quarantine import Quarantine, SetAside
from fastgrpo.errors import InputError
from fastgrpo.images import ImageFault, image_size, load_image
from fastgrpo.images.read import embedded_bytes, refuse_remote, regular_file

logger = logging.getLogger(__name__)

VERIFY = ("header", "decode", "none")
# Names TRL passes to a reward function itself, and those this module adds.
RESERVED = (
    *("prompts", "completion", "completions", "completion_ids", "trainer_state"),
    *("log_extra", "log_metric", "environments", "quarantine_reason"),
)


def check_verification(how: str, max_pixels: int) -> None:
    """InputError for a `verify_images` or a `max_image_pixels` that cannot be obeyed."""
    if how not in VERIFY:
        raise InputError(f"verify_images must be one of {', '.join(VERIFY)}, got {how!r}")
    if not isinstance(max_pixels, int) or max_pixels < 1:
        raise InputError(f"max_image_pixels: expected a number above 0, got {max_pixels!r}")


def located(source: Any, folder: Path | None) -> Any:
    """`source` with a relative path made one below `folder`; raises `ImageFault` for no file."""
    if folder is None:
        return source
    if isinstance(source, dict) and source.get("bytes") is None:
        source = source.get("path")
    if not isinstance(source, str) or embedded_bytes(source) is not None:
        return source
    refuse_remote(source)
    return str(regular_file(folder / source))


def verify_image(source: Any, how: str, max_pixels: int) -> None:
    """Raises `ImageFault`: "header" looks at kind and size, "decode" at every pixel."""
    if how == "header":
        image_size(source, max_pixels)
    elif how == "decode":
        load_image(source, max_pixels)


def check_columns(names: Sequence[str], where: str) -> None:
    taken = sorted(set(names) & set(RESERVED))
    if taken:
        raise InputError(
            f"{where}: column {taken[0]!r} has a name the trainer uses itself; rename it"
        )


def finish(
    dataset,
    quarantine: Quarantine,
    num_rows: int,
    where: str,
    sources: str | None,
    pixels: int,
    folder: Path | None = None,
):
    """`dataset` with its images opened row by row from column `sources`, and `.quarantined`.

    Without `sources` it is text. Relative paths start from `folder` when there is one. `num_rows`
    counts the rows set aside as well. Raises `InputError` when none is left.
    """
    if not num_rows or not len(dataset):
        first = next(iter(quarantine), None)
        shown = "" if first is None else f"; the first: {first.file}:{first.line}: {first.message}"
        raise InputError(f"{where}: no usable row ({len(quarantine)} set aside{shown})")
    if len(quarantine):
        logger.warning(
            "%d of %d rows set aside: %s", len(quarantine), num_rows, quarantine.counts()
        )
    if sources is not None:
        dataset = dataset.with_transform(OpenImages(quarantine, pixels, sources, folder))
    dataset.quarantined = quarantine
    return dataset


class OpenImages:
    """A dataset's transform: adds `images` and `quarantine_reason` to the rows being read.

    A row whose image breaks gets blank ones, as many as its prompt has places, and the reason,
    which excludes it from the loss under `FastGRPOTrainer`; the reason is None otherwise.
    """

    def __init__(
        self, quarantine: Quarantine, max_pixels: int, sources: str, folder: Path | None = None
    ):
        self.quarantine, self.max_pixels = quarantine, max_pixels
        self.sources, self.folder = sources, folder

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        if self.sources not in rows or "data_row" not in rows:  # single columns were asked for
            return rows
        opened = [self._open(rows, index) for index in range(len(rows["data_row"]))]
        if self.sources != "image_path":
            rows = {name: values for name, values in rows.items() if name != self.sources}
        return rows | {
            "images": [images for images, _ in opened],
            "quarantine_reason": [reason for _, reason in opened],
        }

    def _open(self, rows: dict[str, list], index: int) -> tuple[list[Image.Image], str | None]:
        sources = rows[self.sources][index]
        if not isinstance(sources, list):
            sources = [] if sources is None else [sources]
        try:
            found = (located(source, self.folder) for source in sources)
            return [load_image(source, self.max_pixels) for source in found], None
        except ImageFault as fault:
            file, _, line = rows["data_row"][index].rpartition(":")
            own_id = rows["id"][index] if "id" in rows else None
            self.quarantine.add(SetAside(file, int(line), own_id, fault.reason, str(fault)))
            return [Image.new("RGB", (56, 56)) for _ in sources], fault.reason
