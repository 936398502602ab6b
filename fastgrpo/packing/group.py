# SPDX-License-Identifier: Apache-2.0
"""A GRPO group as the engine takes it: one prompt, its images, and its completions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.packing.host import host_copies, on_host

_PER_TOKEN = ("old_logp", "ref_logp", "rollout_logp", "mask", "token_weights")


@dataclass(eq=False)
class Group:
    """One prompt with its images and the G completions sampled from it.

    `prompt_ids` (P,) int64, image placeholders already expanded; `completions` a list of (C_i,)
    int64, any of them may be empty; `vision` the processor's outputs for this prompt
    (`pixel_values`, `image_grid_thw`, ...); `advantages` (G,) or a list of (C_i,); `old_logp`,
    `ref_logp`, `rollout_logp` lists of (C_i,) floats; `mask` a list of (C_i,), nonzero where the
    token counts in the loss; `token_weights` a list of (C_i,) floats that multiply the policy term
    (VPPO's token mask); `streams` further log-probs by name, each a list of (C_i,) floats, for
    `GRPOStep`'s `kl_streams`; `completion_vision` the processor's outputs for the images inside
    each completion (a tool returned them), {} where there is none: their placeholders have no loss.
    `sample_id` is only used in error messages.

    Raises `InputError` naming the sample, the argument, what was expected and what came.
    """

    prompt_ids: Tensor
    completions: list[Tensor]
    vision: dict[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | list[Tensor] | None = None
    old_logp: list[Tensor] | None = None
    ref_logp: list[Tensor] | None = None
    rollout_logp: list[Tensor] | None = None
    mask: list[Tensor] | None = None
    sample_id: object = None
    token_weights: list[Tensor] | None = None
    streams: dict[str, list[Tensor]] = field(default_factory=dict)
    completion_vision: list[dict[str, Tensor]] | None = None

    def __post_init__(self):
        self.completions = list(self.completions)
        _check_ids(self, "prompt_ids", self.prompt_ids)
        if self.prompt_ids.numel() == 0:
            raise InputError(f"{self.name}: prompt_ids is empty; a prompt needs at least one token")
        for i, completion in enumerate(self.completions):
            _check_ids(self, f"completions[{i}]", completion)
        _check_vision(self, "vision", self.vision)
        if self.completion_vision is not None:
            if len(self.completion_vision) != len(self.completions):
                raise InputError(
                    f"{self.name}: completion_vision has {len(self.completion_vision)} entries for "
                    f"{len(self.completions)} completions"
                )
            for i, vision in enumerate(self.completion_vision):
                _check_vision(self, f"completion_vision[{i}]", vision)
        for key in _PER_TOKEN:
            if getattr(self, key) is not None:
                setattr(self, key, _check_per_token(self, key, getattr(self, key)))
        for key, value in self.streams.items():
            self.streams[key] = _check_per_token(self, f"streams[{key!r}]", value)
        if self.advantages is not None:
            self._check_advantages()

    @property
    def name(self) -> str:
        return "group" if self.sample_id is None else f"sample {self.sample_id!r}"

    def vision_of(self, completion: int) -> dict[str, Tensor]:
        """The images inside a completion."""
        return self.completion_vision[completion] if self.completion_vision else {}

    @property
    def lengths(self) -> list[int]:
        return [c.numel() for c in self.completions]

    def token_advantages(self, i: int) -> Tensor:
        """(C_i,) advantages of completion i, whichever way they were given."""
        a = self.advantages[i]
        return a.expand(self.completions[i].numel()) if a.ndim == 0 else a

    def with_vision(self, vision: dict[str, Tensor]) -> Group:
        """The same group seeing other pixels of the same size, such as a perturbed image."""
        old = {k: tuple(v.shape) for k, v in self.vision.items()}
        new = {k: tuple(v.shape) for k, v in vision.items()}
        if old != new:
            raise InputError(f"{self.name}: vision must keep its shapes {old}, got {new}")
        return replace(self, vision=vision)

    def _check_advantages(self):
        count = len(self.completions)
        if isinstance(self.advantages, Tensor):
            if self.advantages.shape != (count,) or not self.advantages.is_floating_point():
                raise InputError(
                    f"{self.name}: advantages must be a float tensor of shape ({count},), one per "
                    f"completion, got {self.advantages.dtype} {tuple(self.advantages.shape)}"
                )
        elif isinstance(self.advantages, (list, tuple)) and all(
            isinstance(a, Tensor) for a in self.advantages
        ):
            self.advantages = _check_per_token(self, "advantages", self.advantages)
        else:
            raise InputError(
                f"{self.name}: advantages must be a tensor of shape ({count},) or a list of "
                f"{count} tensors of shape (C_i,), got {type(self.advantages).__name__}"
            )
        if all(on_host(a) for a in self.advantages):
            self.check_finite()

    def check_finite(self) -> None:
        """`InputError` naming the first advantage that is not finite. Advantages on a device are
        looked at when a step has copied them to the host."""
        for i, advantage in enumerate(self.advantages):
            if not torch.isfinite(advantage).all():
                raise InputError(f"{self.name}: advantages[{i}] is not finite")


def hosted(groups: Sequence[Group]) -> list[Group]:
    """The groups with all that the host reads (ids, masks, advantages, the sizes of images) on the
    host, copied at once; pixels and log-probs stay where they are."""
    read: list[Tensor] = []
    for group in groups:
        _host_fields(group, lambda x: read.append(x))
    if all(on_host(x) for x in read):
        return list(groups)
    copies = iter(host_copies(read))
    moved = [copy.copy(group) for group in groups]
    for group in moved:
        vars(group).update(_host_fields(group, lambda _: next(copies)))
    return moved


def _host_fields(group: Group, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What the host reads of a group, `function` applied to each of its tensors."""

    def each(values: Tensor | list[Tensor] | None):
        if values is None or isinstance(values, Tensor):
            return values if values is None else function(values)
        return [function(x) for x in values]

    fields = {
        name: each(getattr(group, name))
        for name in ("prompt_ids", "completions", "mask", "advantages")
    }

    def sizes(vision: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: x if are_pixels(x) else function(x) for key, x in vision.items()}

    inside = group.completion_vision
    return fields | {
        "vision": sizes(group.vision),
        "completion_vision": inside and [sizes(vision) for vision in inside],
    }


def are_pixels(x: Tensor) -> bool:
    """Whether an input of images is one that the host does not read."""
    return x.is_floating_point() and x.ndim > 1


def _check_vision(group: Group, what: str, vision: object) -> None:
    if not isinstance(vision, Mapping):
        raise InputError(
            f"{group.name}: {what} must be a dict of the processor's outputs, {{}} without images, "
            f"got {type(vision).__name__}"
        )
    for key, value in vision.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{group.name}: {what}[{key!r}] must be a tensor (the processor's output), "
                f"got {type(value).__name__}"
            )


def _check_ids(group: Group, what: str, ids: object):
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype != torch.int64:
        came = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"{group.name}: {what} must be a 1-D int64 tensor, got {came}")


def _check_per_token(group: Group, key: str, values: object) -> list[Tensor]:
    if not isinstance(values, (list, tuple)):
        raise InputError(
            f"{group.name}: {key} must be a list with one tensor per completion, "
            f"got {type(values).__name__}"
        )
    if len(values) != len(group.completions):
        raise InputError(
            f"{group.name}: {key} has {len(values)} entries for "
            f"{len(group.completions)} completions"
        )
    for i, (value, length) in enumerate(zip(values, group.lengths, strict=True)):
        if not isinstance(value, Tensor) or value.shape != (length,):
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{group.name}: {key}[{i}] must have shape ({length},), got {came}")
        if key != "mask" and not value.is_floating_point():
            raise InputError(f"{group.name}: {key}[{i}] must be floating point, got {value.dtype}")
    return list(values)
