# SPDX-License-Identifier: Apache-2.0
"""A processor that reads each distinct row of a batch once, and its images once for both calls.

TRL hands it every row of a generation batch, G rows a prompt, once to tokenize and once for the
images. Letters: B rows, R of them distinct.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.host import first_equal, nobody_writes_to


@contextlib.contextmanager
def distinct_rows(trainer, adapter: Adapter) -> Iterator[None]:
    """Inside, the trainer's processor returns what it always does, and reads neighbouring rows of
    the same text and images once; tokenizers, which are fast, stay as they are."""
    processor = trainer.processing_class
    if isinstance(processor, ProcessorMixin) and adapter.family.vision_inputs:
        trainer.processing_class = _standing_in(processor, adapter)
    try:
        yield
    finally:
        trainer.processing_class = processor


def _standing_in(processor: ProcessorMixin, adapter: Adapter) -> ProcessorMixin:
    """An object of the processor's class that shares all its attributes; only calls differ."""
    cls = type(processor)
    vision_rows = _VisionRows(adapter)
    reads_once = _images_once(processor.image_processor)

    class OfDistinctRows(cls):
        @property
        def image_processor(self):
            return reads_once

        def __call__(self, images=None, text=None, **kwargs):
            read = super().__call__
            other = any(kwargs.get(kind) is not None for kind in ("videos", "audio"))
            if other or not _by_row(images, text):
                return read(images=images, text=text, **kwargs)
            return _read(read, vision_rows, images, text, kwargs)

    double = object.__new__(OfDistinctRows)
    double.__dict__ = processor.__dict__
    return double


def _images_once(image_processor):
    """An object of its class that shares all its attributes; the images of the call before, read
    by the same options into arrays alone, it does not read again."""
    cls = type(image_processor)

    class OfNewImages(cls):
        before: tuple[list, BatchFeature] | None = None

        def __call__(self, images, *args, return_tensors=None, **kwargs):
            before = type(self).before
            given = [images, args, kwargs]
            if before is not None and _same(before[0], given):
                return BatchFeature(dict(before[1]), tensor_type=return_tensors)
            read = super().__call__(images, *args, return_tensors=return_tensors, **kwargs)
            if all(isinstance(value, np.ndarray) for value in read.values()):
                type(self).before = given, read
            return read

    double = object.__new__(OfNewImages)
    double.__dict__ = image_processor.__dict__
    return double


def _by_row(images: Any, text: Any) -> bool:
    """Whether each row is one text and the list of its images."""
    return (
        isinstance(images, list)
        and isinstance(text, list)
        and len(images) == len(text)
        and all(row is None or isinstance(row, (list, tuple)) for row in images)
    )


def _read(read, vision_rows: _VisionRows, images: list, text: list[str], kwargs: dict):
    kept, number = [0], [0]  # the distinct rows, and which of them each row is
    for i in range(1, len(text)):
        if not (text[i] == text[kept[-1]] and _same(images[i], images[kept[-1]])):
            kept.append(i)
        number.append(len(kept) - 1)
    if len(kept) < len(text):
        some = read(images=[images[i] for i in kept], text=[text[i] for i in kept], **kwargs)
        counts = [len(images[i] or ()) for i in kept]
        if (fields := _repeated(vision_rows, some, counts, number)) is not None:
            return type(some)(fields)
    return read(images=images, text=text, **kwargs)


def _same(a: Any, b: Any) -> bool:
    """Whether two rows' images, or what a call was given, are equal in every pixel."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def _repeated(
    vision_rows: _VisionRows, fields: Mapping[str, Any], counts: list[int], number: list[int]
) -> dict[str, Any] | None:
    """The fields of rows `number` (B,) from those of R distinct rows with `counts` images each.

    None where a field is neither one entry a row nor what the family takes apart.
    """
    vision_inputs, repeated = vision_rows.adapter.family.vision_inputs, {}
    for name in fields.keys() - set(vision_inputs):
        if len(fields[name]) != len(counts):
            return None
        repeated[name] = _rows(fields[name], number)
    of_rows = vision_rows(fields, counts, number)
    return None if of_rows is None else repeated | of_rows


class _VisionRows:
    """The tower's inputs of B rows from those of the distinct ones; the same tensors where the
    inputs are those of the call before."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.before: tuple[dict[str, Tensor], list[int], list[int]] | None = None
        self.repeated: dict[str, Tensor] | None = None

    def __call__(
        self, fields: Mapping[str, Any], counts: list[int], number: list[int]
    ) -> dict[str, Tensor] | None:
        """None where the family does not take the inputs apart: undone and made again, the R rows
        must give the same."""
        vision = {
            name: torch.as_tensor(np.asarray(fields[name]))
            for name in self.adapter.family.vision_inputs
            if fields.get(name) is not None
        }
        if self.before is None or not (
            self.before[1:] == (counts, number) and _equal(self.before[0], vision)
        ):
            self.repeated = self._repeat(fields, vision, counts, number)
            for repeated in (self.repeated or {}).values():
                nobody_writes_to(repeated)
            kept = {name: x.clone() for name, x in vision.items()}
            self.before = kept, counts, number
        return self.repeated

    def _repeat(
        self,
        fields: Mapping[str, Any],
        vision: dict[str, Tensor],
        counts: list[int],
        number: list[int],
    ) -> dict[str, Tensor] | None:
        if all(count == 1 for count in counts) and all(
            len(x) == len(counts) for x in vision.values()
        ):
            return {name: _rows(x, number) for name, x in vision.items()}
        family = self.adapter.family
        images = family.image_counts(self.adapter.config, fields["input_ids"], vision, counts)
        rows = family.split_rows(vision, images, len(counts))
        if not _equal(family.join_images([row for row in rows if row]), vision):
            return None
        return family.join_images([rows[n] for n in number if rows[n]])


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return first_equal([a, b]) == [0, 0]


def _rows(values: Any, number: Sequence[int]) -> Any:
    if isinstance(values, Tensor):
        return values[torch.tensor(number)]
    return [values[n] for n in number]
