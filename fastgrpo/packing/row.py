# SPDX-License-Identifier: Apache-2.0
"""From a plan to the tensors of one forward: ids, positions, images, targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgrpo.errors import InputError
from fastgrpo.losses.tokens import IGNORE
from fastgrpo.models.family import TEXT_OUTPUTS
from fastgrpo.packing.group import Group
from fastgrpo.packing.host import device_copies
from fastgrpo.packing.layout import GroupLayout
from fastgrpo.packing.planner import Part
from fastgrpo.packing.vision import Images


class PackedRow:
    """One row: `parts` in order, each prompt once, then its completions; groups are `hosted`.

    `inputs` are the model's keyword arguments, `targets` (N,) int64 the completion tokens in row
    order, `num_targets` how many of them have a loss, `members` the (group, completion) of each
    completion and `lengths` their lengths, `following` the position after each part's prompt.
    `image_ids` are its images, a prompt's once; `padded_tokens` and `padded_image_ids` those of a
    batch with a row per completion, each as long as the longest; `spare`: bytes of activations that
    what the row goes on from has left it of theirs.
    """

    def __init__(
        self,
        adapter,
        parts: Sequence[Part],
        groups: Sequence[Group],
        backend: str,
        *,
        images: Images | None = None,
        neutral_id: int | None = None,
    ):
        """`adapter` is a `models.Adapter`; `images` the step's distinct images, found here if not
        given. `neutral_id`: an image placeholder inside a completion is fed to the model as this
        token and has no loss; None: it is an `InputError`."""
        device = adapter.device
        self.parts, self.groups = parts, groups
        self.members = [member for part in parts for member in part.members]
        self.lengths = [length for part in parts for length in part.lengths]
        layout = [(part.group.prompt_ids.numel(), part.lengths) for part in parts]
        self.layout = GroupLayout(
            layout,
            device=device,
            backend=backend,
            blocks=_blocks(adapter, parts),
            local_blocks=adapter.family.local_blocks,
        )

        sent, self.following = _tokens(adapter, parts, groups, neutral_id)
        self.num_targets = int((sent[2] != IGNORE).sum())
        input_ids, position_ids, self.targets = device_copies(sent, device)
        if adapter.family.axes > 1:
            position_ids = position_ids[:, None]  # (A, 1, T)
        self.inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            # A 4-D mask is passed through as it is: transformers must not infer the structure of
            # the row from positions or build a (T, T) mask of its own.
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
            "fg_layout": self.layout,
            "logits_to_keep": self.layout.keep_rows,
            "use_cache": False,
        }
        if images is None:
            images = Images(adapter.family, [part.group for part in parts], groups)
        self.images = images
        self.image_ids, self.padded_image_ids = [], []
        for part in parts:
            shared = images.ids_of(part.group.vision)
            own = [i for g, c in part.members for i in images.ids_of(groups[g].vision_of(c))]
            self.image_ids += shared + own
            self.padded_image_ids += shared * len(part.members) + own
        longest = max(prompt + max(lengths, default=0) for prompt, lengths in layout)
        self.padded_tokens = longest * len(self.members)
        self.spare = 0.0

    def predicting(self, hidden: Tensor) -> Tensor:
        """(U, D) hidden states that predict a token, from those of the rows the model kept."""
        return hidden

    @property
    def mask(self) -> Tensor:
        """(N,) bool: the tokens with a loss."""
        return self.targets != IGNORE


def _tokens(
    adapter, parts: Sequence[Part], groups: Sequence[Group], neutral_id: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor], list[int]]:
    """((1, T) ids, (A, T) positions, (N,) targets) of a row on the host, and the position after
    each part's prompt."""
    ids, positions, targets, after = [], [], [], []
    for part in parts:
        prompt = part.group.prompt_ids
        where = adapter.prompt_positions(prompt, part.group.vision)
        # Completions go on where text after the prompt would, not at its length: an image of
        # h x w tokens advances the positions by max(h, w).
        following = int(where[0, -1])
        after.append(following)
        ids.append(prompt)
        positions.append(where[:, :-1])
        for g, c in part.members:
            fed, target = fed_and_target(adapter, groups[g], c, neutral_id)
            ids.append(fed)
            targets.append(target)
            positions.append(positions_after(adapter, part.group, groups[g], c, following))
    targets.append(torch.zeros(0, dtype=torch.int64))
    return (torch.cat(ids)[None], torch.cat(positions, 1), torch.cat(targets)), after


def positions_after(adapter, prompt: Group, group: Group, c: int, following: int) -> Tensor:
    """(A, C) positions of completion c of `group` behind the prompt, which text follows at
    `following`."""
    ids, own = group.completions[c], group.vision_of(c)
    if own:
        given = (prompt.prompt_ids, prompt.vision, ids, own)
        return adapter.family.completion_positions(adapter.core, *given)
    after = torch.arange(following, following + ids.numel())
    return after.expand(adapter.family.axes, -1)


def _blocks(adapter, parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Bounds in the row of the prompt tokens that see one another both ways."""
    found, offset = [], 0
    for part in parts:
        inside = adapter.family.blocks(adapter.config, part.group.prompt_ids.cpu())
        found += [(offset + start, offset + end) for start, end in inside]
        offset += part.tokens
    return found


def check_prompt(adapter, group: Group) -> None:
    """`InputError` naming sample, tokens and features when ids or images do not fit the model."""
    vocabulary = _plain(adapter.core.get_input_embeddings()).num_embeddings
    names = ["prompt_ids"] + [f"completions[{i}]" for i in range(len(group.completions))]
    for name, ids in zip(names, [group.prompt_ids, *group.completions], strict=True):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise InputError(f"{group.name}: {name} has an id outside [0, {vocabulary})")
    _check_images(adapter, group, group.prompt_ids, group.vision)
    for c, vision in enumerate(group.completion_vision or ()):
        if vision and not adapter.family.serves_images_in_completions:
            raise InputError(
                f"{group.name}: completion_vision[{c}]: images inside a completion are not served "
                f"for family {adapter.family.name!r}"
            )
        if vision:
            _check_images(adapter, group, group.completions[c], vision, f"completions[{c}]")


def _plain(embedding: nn.Module) -> nn.Module:
    """The embedding under what PEFT wraps around it."""
    for inner in ("base_layer", "original_module"):
        if hasattr(embedding, inner):
            return _plain(getattr(embedding, inner))
    return embedding


def _check_images(adapter, group: Group, ids: Tensor, vision, what: str = "prompt_ids") -> None:
    family = adapter.family
    given = [key for key in vision if key not in TEXT_OUTPUTS]
    if not family.vision_inputs:
        if given:
            raise InputError(f"{group.name}: images given to text model {family.name!r}")
        return
    for key in given:
        if key not in family.media_inputs:
            expected = f"expected {list(family.media_inputs)}"
            why = "videos are not served" if "video" in key else expected
            raise InputError(f"{group.name}: vision[{key!r}] is not understood; {why}")
    image, *others = adapter.placeholders
    if family.video_inputs:
        video, *others = others
        _check_kind(adapter, group, ids, vision, what, "video", family.video_inputs, video)
    if bool(torch.isin(ids, torch.tensor(others)).any()):
        raise InputError(f"{group.name}: {what} has video placeholders; videos are not served")
    _check_kind(adapter, group, ids, vision, what, "image", family.vision_inputs, image)


def _check_kind(adapter, group, ids, vision, what, kind, inputs: Sequence[str], token: int) -> None:
    """`InputError` when the placeholders of images or of videos are not their features."""
    family, runs = adapter.family, _runs(ids == token)
    if not any(key in vision for key in inputs):
        if runs:
            raise InputError(
                f"{group.name}: {what} has {sum(runs)} {kind} tokens, vision has no {kind}s"
            )
        return
    for key in inputs:
        if key not in vision:
            raise InputError(f"{group.name}: vision lacks {key!r}")
    try:
        family.check_vision(vision)
    except InputError as error:
        raise InputError(f"{group.name}: {error}") from None
    if kind == "image":
        images = family.split_images(vision)
        features = [family.image_tokens(part, adapter.config) for part in images]
        fits = family.fits(runs, features)
    else:
        videos = family.split_videos(vision)
        features = [run for part in videos for run in family.video_runs(part, adapter.config)]
        fits = runs == features
    if not fits:
        raise InputError(
            f"{group.name}: {kind} tokens and {kind} features do not match: {what} has "
            f"{sum(runs)} tokens in runs {runs}, vision has {sum(features)} features {features}"
        )


def _runs(flags: Tensor) -> list[int]:
    """Lengths of the runs of True."""
    padded = torch.zeros(flags.numel() + 2, dtype=torch.int8)
    padded[1:-1] = flags
    step = padded.diff()
    return ((step == -1).nonzero() - (step == 1).nonzero())[:, 0].tolist()


def fed_and_target(adapter, group: Group, c: int, neutral_id: int | None) -> tuple[Tensor, Tensor]:
    """(C,) ids of completion c to feed and (C,) targets, `IGNORE` where the token has no loss."""
    ids = group.completions[c]
    target = ids
    if group.mask is not None:
        target = torch.where(group.mask[c] != 0, ids, IGNORE)
    if not adapter.placeholders:
        return ids, target
    bad = torch.isin(ids, torch.tensor(adapter.placeholders))
    if not bool(bad.any()):
        return ids, target
    if group.vision_of(c):  # the images' own, checked with them
        return ids, target.masked_fill(bad, IGNORE)
    if neutral_id is None:
        where = int(bad.nonzero()[0, 0])
        raise InputError(
            f"{group.name}: completions[{c}] has the image or video placeholder {int(ids[where])} "
            f"at token {where}, where there is no image; forbid the id in sampling"
        )
    return ids.masked_fill(bad, neutral_id), target.masked_fill(bad, IGNORE)
