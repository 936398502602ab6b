# SPDX-License-Identifier: Apache-2.0
"""Each distinct image is encoded once per pass, however many prompts and rows use it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.family import Family, Features, Join, Vision
from fastgrpo.packing.group import Group
from fastgrpo.packing.host import first_equal


class Images:
    """The distinct images of some prompts: equal in every input of the tower, checked exactly.

    `ids_of(group)` lists a prompt's images in order; `distinct[i]` are the inputs of image i.
    """

    def __init__(self, family: Family, groups: Iterable[Group]):
        self.family = family
        shown = {id(group): group for group in groups if family.has_images(group.vision)}
        split = {key: family.split_images(group.vision) for key, group in shown.items()}
        images = [image for part in split.values() for image in part]
        first = first_equal(images)
        number = {i: n for n, i in enumerate(dict.fromkeys(first))}
        self.distinct: list[Vision] = [images[i] for i in number]
        ids = iter(number[i] for i in first)
        self._of = {key: [next(ids) for _ in part] for key, part in split.items()}

    def ids_of(self, group: Group) -> list[int]:
        return self._of.get(id(group), [])

    def inputs(self, ids: Sequence[int], device: torch.device) -> Vision:
        """The vision tower's inputs for these images; for none those of some image, so that the
        model asks for features at all."""
        joined = self.family.join_images([self.distinct[i] for i in ids or (0,)])
        return {name: value.to(device) for name, value in joined.items()}


class FeatureStore:
    """Features of the images that more than one row uses.

    With `detach`, rows see leaves whose gradients add up, so that each row can be differentiated
    on its own; `backward` then runs the vision tower's backward once.
    """

    def __init__(self, keep: set[int], *, detach: bool = False):
        self.keep, self.detach = keep, detach
        self.join: Join | None = None  # from features to what the model's forward reads
        # image -> its pooled features, then those of each deepstack layer
        self._features: dict[int, Features] = {}
        self._sources: list[tuple[Tensor, Tensor]] = []  # (the tower's output, its leaf)

    def missing(self, ids: Iterable[int]) -> list[int]:
        """The distinct images of `ids`, in order, whose features are not here yet."""
        return [i for i in dict.fromkeys(ids) if i not in self._features]

    def put(self, image: int, features: Features) -> Features:
        if image in self.keep:
            if self.detach:
                features = [self._leaf(f) for f in features]
            self._features[image] = features
        return features

    def get(self, image: int) -> Features | None:
        return self._features.get(image)

    def backward(self) -> None:
        """Send what the rows left in the leaves through the vision tower."""
        pairs = [(source, leaf.grad) for source, leaf in self._sources if leaf.grad is not None]
        self._sources, self._features = [], {}
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))

    def _leaf(self, feature: Tensor) -> Tensor:
        if not feature.requires_grad:
            return feature
        leaf = feature.detach().requires_grad_()
        self._sources.append((feature, leaf))
        return leaf


@contextlib.contextmanager
def shared_features(
    adapter: Adapter, images: Images, ids: Sequence[int], encoded: Sequence[int], store
) -> Iterator[None]:
    """Inside, the model's image features are those of `ids`, in this order.

    The forward is given the pixels of `encoded` only; the others are in the `FeatureStore`. The
    tower still runs where the model calls it, inside the root's forward.
    """

    def features(original, *args, **kwargs):
        fresh = {}
        if encoded:
            output = original(*args, **kwargs)
            inputs = [images.distinct[i] for i in encoded]
            parts, store.join = adapter.family.split_features(output, inputs)
            for image, part in zip(encoded, parts, strict=True):
                fresh[image] = store.put(image, part)
        return store.join([fresh[i] if i in fresh else store.get(i) for i in ids])

    with _replaced_encoder(adapter, features):
        yield


@contextlib.contextmanager
def idle_tower(adapter: Adapter) -> Iterator[Vision]:
    """Inside, a forward given these inputs runs the tower on one blank image and uses nothing of
    it: its parameters get zero gradients, and its collectives run."""
    blank = adapter.family.blank_image(adapter.config)

    def features(original, *args, **kwargs):
        parts, join = adapter.family.split_features(original(*args, **kwargs), [blank])
        return join([[feature[:0] for feature in part] for part in parts])

    with _replaced_encoder(adapter, features):
        yield {name: value.to(adapter.device) for name, value in blank.items()}


@contextlib.contextmanager
def _replaced_encoder(adapter: Adapter, function) -> Iterator[None]:
    """Inside, the model gets function(its own get_image_features, *its arguments)."""
    owner = adapter.family.encoder(adapter.core)
    original = owner.get_image_features
    owner.get_image_features = functools.partial(function, original)
    try:
        yield
    finally:
        del owner.get_image_features
