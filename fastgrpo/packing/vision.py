# SPDX-License-Identifier: Apache-2.0
"""Each distinct image is encoded once per pass, however many prompts and rows use it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastgrpo.models.adapter import Adapter
from fastgrpo.models.family import Family, Features, Join, Vision
from fastgrpo.packing.group import Group
from fastgrpo.packing.host import first_equal


class Images:
    """The distinct images and videos of some prompts, and of completions: equal in every input of
    the tower, checked exactly.

    `ids_of(vision)` lists a prompt's or a completion's in order, images first; `distinct[i]` are
    the inputs of one.
    """

    def __init__(self, family: Family, prompts: Iterable[Group], groups: Iterable[Group] = ()):
        """Those of the prompts of `prompts` and of the completions of `groups`."""
        self.family = family
        inside = (vision for group in groups for vision in group.completion_vision or ())
        shown = {id(vision): vision for vision in (*(g.vision for g in prompts), *inside)}
        split = {key: family.split_media(vision) for key, vision in shown.items()}
        images = [image for part in split.values() for image in part]
        first = first_equal(images)
        number = {i: n for n, i in enumerate(dict.fromkeys(first))}
        self.distinct: list[Vision] = [images[i] for i in number]
        ids = iter(number[i] for i in first)
        self._of = {key: [next(ids) for _ in part] for key, part in split.items()}

    def ids_of(self, vision: Vision) -> list[int]:
        return self._of.get(id(vision), [])

    def by_kind(self, ids: Sequence[int]) -> dict[str, list[int]]:
        """The ids of images and of videos, in order, under the kinds that there are."""
        kinds: dict[str, list[int]] = {}
        for i in ids:
            kinds.setdefault(self.family.kind_of(self.distinct[i]), []).append(i)
        return kinds

    def inputs(
        self, ids: Sequence[int], device: torch.device, company: Sequence[Vision] = ()
    ) -> Vision:
        """The vision tower's inputs for these images, or these videos, and for `company`."""
        joined = self.family.join_images([*(self.distinct[i] for i in ids), *company])
        return {name: value.to(device) for name, value in joined.items()}

    def company(self, config, ids: Sequence[int]) -> list[Vision]:
        """What is encoded beside these, see `Family.company`."""
        return self.family.company(config, [self.distinct[i] for i in ids])


class FeatureStore:
    """Features of the images that more than one row uses.

    With `detach`, rows see leaves whose gradients add up, so that each row can be differentiated
    on its own; `backward` then runs the vision tower's backward once.
    """

    def __init__(self, keep: set[int], *, detach: bool = False):
        self.keep, self.detach = keep, detach
        self.join: dict[str, Join] = {}  # by kind, from features to what the forward reads
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


class KeptFeatures:
    """Features that no step changes (see `Adapter.features_are_constant`), kept between passes.

    `store(images)` is a pass's store: it has what earlier passes encoded of equal images, and what
    this one encodes stays here.
    """

    def __init__(self):
        self.images: list[Vision] = []
        self.features: list[Features] = []
        self.join: dict[str, Join] = {}

    def store(self, images: Images) -> FeatureStore:
        return _KeptStore(self, images)


class _KeptStore(FeatureStore):
    def __init__(self, kept: KeptFeatures, images: Images):
        super().__init__(set(range(len(images.distinct))))
        self.kept, self.images, self.join = kept, images.distinct, kept.join
        first = first_equal([*kept.images, *images.distinct])[len(kept.images) :]
        known = len(kept.images)
        self._features = {i: kept.features[j] for i, j in enumerate(first) if j < known}

    def put(self, image: int, features: Features) -> Features:
        features = super().put(image, [feature.detach() for feature in features])
        self.kept.images.append(self.images[image])
        self.kept.features.append(features)
        return features


@contextlib.contextmanager
def shared_features(
    adapter: Adapter,
    images: Images,
    wanted: dict[str, list[int]],
    calls: dict[str, list[list[int]]],
    store: FeatureStore,
) -> Iterator[Vision]:
    """Inside, the features of each kind are those of the `wanted` ids, in this order.

    `calls`: of each kind the images that each call of the tower encodes, all that are not in the
    `FeatureStore`. Yields the inputs of the forward, which is given the pixels of the first call
    (of one image where there is none, so that the model asks at all). The tower still runs where
    the model calls it, inside the root's forward.
    """
    inputs, functions = {}, {}
    for kind, ids in wanted.items():
        some = calls[kind][0] if calls[kind] else ids[:1]
        inputs |= images.inputs(some, adapter.device, images.company(adapter.config, some))
        shared = functools.partial(_features, adapter, images, kind, ids, calls[kind], store)
        functions[kind] = shared
    with _replaced_encoders(adapter, functions):
        yield inputs


def _features(adapter, images: Images, kind: str, ids, calls, store, original, *args, **kwargs):
    fresh = {}
    for n, encoded in enumerate(calls):
        if n:
            given = inspect.signature(original).bind(*args, **kwargs)
            given.arguments.update(images.inputs(encoded, adapter.device))
            args, kwargs = given.args, given.kwargs
        output = original(*args, **kwargs)
        shown = [images.distinct[i] for i in encoded]
        shown += images.company(adapter.config, encoded)
        parts, store.join[kind] = adapter.family.split_features(output, shown)
        for image, part in zip(encoded, parts[: len(encoded)], strict=True):
            fresh[image] = store.put(image, part)
    return store.join[kind]([fresh[i] if i in fresh else store.get(i) for i in ids])


@contextlib.contextmanager
def idle_tower(adapter: Adapter) -> Iterator[Vision]:
    """Inside, a forward given these inputs runs the tower on one blank image and uses nothing of
    it: its parameters get zero gradients, and its collectives run."""
    blank = adapter.family.blank_image(adapter.config)

    def features(original, *args, **kwargs):
        parts, join = adapter.family.split_features(original(*args, **kwargs), [blank])
        return join([[feature[:0] for feature in part] for part in parts])

    with _replaced_encoders(adapter, {"image": features}):
        yield {name: value.to(adapter.device) for name, value in blank.items()}


@contextlib.contextmanager
def _replaced_encoders(adapter: Adapter, functions: dict[str, Callable]) -> Iterator[None]:
    """Inside, the model gets function(its own get_image_features, *its arguments), and likewise of
    its videos.

    While a function runs all methods are the model's own: the one for videos may call that for
    images.
    """
    owner = adapter.family.encoder(adapter.core)
    ours: dict[str, Callable] = {}

    def replacement(name: str, function: Callable) -> Callable:
        original = getattr(owner, name)

        def replaced(*args, **kwargs):
            for other in ours:
                delattr(owner, other)
            try:
                return function(original, *args, **kwargs)
            finally:
                vars(owner).update(ours)

        return replaced

    for kind, function in functions.items():
        name = f"get_{kind}_features"
        ours[name] = replacement(name, function)
    vars(owner).update(ours)
    try:
        yield
    finally:
        for name in ours:
            delattr(owner, name)
