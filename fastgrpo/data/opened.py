"""Images opened when a row is read: the last step of every dataset made here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from PIL import Image

from fastgrpo.data.quarantine import Quarantine, SetAside
from fastgrpo.errors import InputError
from fastgrpo.images import ImageFault, image_size, load_image

logger = logging.getLogger(__name__)

VERIFY = ("header", "decode", "none")
# Names TRL passes to a reward function itself, and those this module adds.
RESERVED = (
    *("prompts", "completion", "completions", "completion_ids", "trainer_state"),
    *("log_extra", "log_metric", "environments", "quarantine_reason"),
)


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


def finish(dataset, quarantine: Quarantine, num_rows: int, where: str, sources: str, pixels: int):
    """`dataset` with its images opened row by row from column `sources`, and `.quarantined`.

    `num_rows` is the number before rows were set aside. Raises `InputError` when none is left.
    """
    if not num_rows or not len(dataset):
        first = next(iter(quarantine), None)
        shown = "" if first is None else f"; the first: {first.file}:{first.line}: {first.message}"
        raise InputError(f"{where}: no usable row ({len(quarantine)} set aside{shown})")
    if len(quarantine):
        logger.warning(
            "%d of %d rows set aside: %s", len(quarantine), num_rows, quarantine.counts()
        )
    dataset = dataset.with_transform(OpenImages(quarantine, pixels, sources))
    dataset.quarantined = quarantine
    return dataset


class OpenImages:
    """A dataset's transform: adds `images` and `quarantine_reason` to the rows being read.

    A row whose image breaks gets blank ones, as many as its prompt has places, and the reason,
    which excludes it from the loss under `FastGRPOTrainer`; the reason is None otherwise.
    """

    def __init__(self, quarantine: Quarantine, max_pixels: int, sources: str):
        self.quarantine, self.max_pixels, self.sources = quarantine, max_pixels, sources

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
        sources = rows[self.sources][index] or []
        try:
            return [load_image(source, self.max_pixels) for source in sources], None
        except ImageFault as fault:
            file, _, line = rows["data_row"][index].rpartition(":")
            own_id = rows["id"][index] if "id" in rows else None
            self.quarantine.add(SetAside(file, int(line), own_id, fault.reason, str(fault)))
            return [Image.new("RGB", (56, 56)) for _ in sources], fault.reason
