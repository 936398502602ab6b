"""Each distinct image is encoded once per pass, however many prompts and rows use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastgrpo.packing.group import Group


class Images:
    """The distinct images of some prompts: equal grid and equal pixels, checked exactly.

    `ids_of(group)` lists a prompt's images in order; `pixels[i]` (patches, width) and `grids[i]`
    (3,) are those of image i.
    """

    def __init__(self, groups: Iterable[Group]):
        self.pixels: list[Tensor] = []
        self.grids: list[Tensor] = []
        self._of: dict[int, list[int]] = {}
        seen: dict[tuple, list[int]] = {}
        for group in groups:
            if id(group) in self._of or "pixel_values" not in group.vision:
                continue
            grid = group.vision["image_grid_thw"]
            parts = group.vision["pixel_values"].split(grid.prod(1).tolist())
            self._of[id(group)] = [
                self._add(pixels, where, seen) for pixels, where in zip(parts, grid, strict=True)
            ]

    def ids_of(self, group: Group) -> list[int]:
        return self._of.get(id(group), [])

    def _add(self, pixels: Tensor, grid: Tensor, seen: dict) -> int:
        key = (tuple(grid.tolist()), pixels.dtype, float(pixels.sum(dtype=torch.float64)))
        for i in seen.setdefault(key, []):
            if torch.equal(self.pixels[i], pixels):
                return i
        seen[key].append(len(self.pixels))
        self.pixels.append(pixels)
        self.grids.append(grid)
        return len(self.pixels) - 1

    def inputs(self, ids: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The vision tower's inputs for these images; empty tensors for none."""
        if not ids:
            return {
                "pixel_values": self.pixels[0][:0].to(device),
                "image_grid_thw": self.grids[0][None][:0].to(device),
            }
        return {
            "pixel_values": torch.cat([self.pixels[i] for i in ids]).to(device),
            "image_grid_thw": torch.stack([self.grids[i] for i in ids]).to(device),
        }


class FeatureStore:
    """Features of the images that more than one row uses.

    With `detach`, rows see leaves whose gradients add up, so that each row can be differentiated
    on its own; `backward` then runs the vision tower's backward once.
    """

    def __init__(self, keep: set[int], *, detach: bool = False):
        self.keep, self.detach = keep, detach
        self.output: type | None = None  # what the model's get_image_features returns
        self.whole = False  # deepstack features are one tensor per layer, not one per image
        # image -> its pooled features, then those of each deepstack layer
        self._features: dict[int, list[Tensor]] = {}
        self._sources: list[tuple[Tensor, Tensor]] = []  # (the tower's output, its leaf)

    def missing(self, ids: Iterable[int]) -> list[int]:
        """The distinct images of `ids`, in order, whose features are not here yet."""
        return [i for i in dict.fromkeys(ids) if i not in self._features]

    def put(self, image: int, features: list[Tensor]) -> list[Tensor]:
        if image in self.keep:
            if self.detach:
                features = [self._leaf(f) for f in features]
            self._features[image] = features
        return features

    def get(self, image: int) -> list[Tensor] | None:
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
    core, ids: Sequence[int], encoded: Sequence[int], store: FeatureStore
) -> Iterator[None]:
    """Inside, the model's image features are those of `ids`, in this order.

    The forward is given the pixels of `encoded` only; the others are in `store`. The tower still
    runs where the model calls it, inside the root's forward.
    """
    owner = core.model
    original = owner.get_image_features

    def get_image_features(pixel_values, image_grid_thw=None, **kwargs):
        fresh = {}
        if encoded:
            output = original(pixel_values, image_grid_thw, **kwargs)
            # transformers 5.17 gives deepstack as one tensor per layer, 5.23 as one per image
            store.output = type(output)
            store.whole = any(isinstance(layer, Tensor) for layer in _deep(output))
            for image, features in zip(encoded, _per_image(output), strict=True):
                fresh[image] = store.put(image, features)
        features = [fresh[i] if i in fresh else store.get(i) for i in ids]
        return _joined(store.output, features, store.whole)

    owner.get_image_features = get_image_features
    try:
        yield
    finally:
        del owner.get_image_features


@contextlib.contextmanager
def idle_tower(core) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward given these inputs runs the tower on one blank image and uses nothing of
    it: its parameters get zero gradients, and its collectives run."""
    config, owner = core.config.vision_config, core.model
    original = owner.get_image_features

    def get_image_features(pixel_values, image_grid_thw=None, **kwargs):
        output = original(pixel_values, image_grid_thw, **kwargs)
        whole = any(isinstance(layer, Tensor) for layer in _deep(output))
        empty = [[f[:0] for f in features] for features in _per_image(output)]
        return _joined(type(output), empty, whole)

    side = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    parameter = next(core.parameters())
    owner.get_image_features = get_image_features
    try:
        yield {
            "pixel_values": torch.zeros(side * side, width, device=parameter.device),
            "image_grid_thw": torch.tensor([[1, side, side]], device=parameter.device),
        }
    finally:
        del owner.get_image_features


def _joined(output: type, features: list[list[Tensor]], whole: bool):
    """What `get_image_features` returns, an `output` of the model's own class, from each image's
    features."""
    pooled, *layers = zip(*features, strict=True)
    deep = [torch.cat(layer) if whole else layer for layer in layers]
    return output(pooler_output=pooled, **({"deepstack_features": deep} if deep else {}))


def _per_image(output) -> list[list[Tensor]]:
    """[pooled, deepstack layer 0, 1, ...] of each image."""
    pooled = list(output.pooler_output)
    sizes = [len(p) for p in pooled]
    layers = [layer.split(sizes) if isinstance(layer, Tensor) else layer for layer in _deep(output)]
    return [list(features) for features in zip(pooled, *layers, strict=True)]


def _deep(output) -> list:
    return getattr(output, "deepstack_features", None) or []
