# SPDX-License-Identifier: Apache-2.0
"""Everything the engine asks of a model family; one file of this folder answers for each.

Letters: P prompt tokens, A axes of the positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.errors import InputError
from fastgrpo.models.join import join

# What a processor returns beside the inputs that describe images.
TEXT_OUTPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")

Vision = dict[str, Tensor]
Features = list[Tensor]  # of one image: for the decoder's input, then for deeper layers
Join = Callable[[Sequence[Features]], Any]


@dataclass(frozen=True)
class Coordinates:
    """How a family was taught to write a box.

    `frame`: "pixels" of the image as the model sees it, resized by its processor; "thousandths" or
    "1024ths" of the image's sides; `order`: "xyxy" or "yxyx"; `source`: where that is written.
    """

    frame: str
    source: str
    order: str = "xyxy"


def filled(kind: type, **values):
    """An output of the model's own class; what is no field of it (in 5.17) is set as models do."""
    fields = {field.name for field in dataclasses.fields(kind)}
    output = kind(**{name: value for name, value in values.items() if name in fields})
    for name in values.keys() - fields:
        setattr(output, name, values[name])
    return output


class Family:
    """A text-only decoder whose positions count its tokens; other families override what differs.

    `name` is transformers' `model_type`. `vision_inputs` are the processor's outputs that describe
    images, as the model's forward takes them, `video_inputs` those that describe videos (none:
    videos are refused), `position_inputs` those that only `positions` reads, `count_inputs` those
    of a trainer's batch that only `split_rows` reads; `axes` the rows of its position ids (3 for
    M-RoPE); `layer_kinds` the values of `layer_types` that are served; `decoders` the text models
    it may be built on (None: its own alone); `varlen_tower` says that the tower's attention is told
    the bounds of images and windows in one sequence, as a variable-length call takes them;
    `coordinates` None says that the family was taught none, so that a box it writes is in no frame.
    """

    vision_inputs: tuple[str, ...] = ()
    video_inputs: tuple[str, ...] = ()
    position_inputs: tuple[str, ...] = ()
    count_inputs: tuple[str, ...] = ()
    axes = 1
    layer_kinds: tuple[str, ...] = ("full_attention", "sliding_attention")
    decoders: tuple[str, ...] | None = None
    varlen_tower = False
    coordinates: Coordinates | None = None

    def __init__(self, name: str):
        self.name = name

    def check_config(self, config) -> None:
        """`InputError` for a config of this family that a packed row cannot serve."""

    def check_training(self, core: nn.Module) -> None:
        """`InputError` for a model in train mode whose gradients would be wrong."""

    # -- tokens and positions

    def placeholders(self, config) -> tuple[int, ...]:
        """Ids that stand for an image, a video or more, in this order, one per feature; never to be
        sampled."""
        return ()

    def image_tokens(self, image: Vision, config) -> int:
        """How many placeholders one image takes."""
        raise NotImplementedError

    def fits(self, runs: list[int], features: list[int]) -> bool:
        """Whether runs of placeholders in a prompt hold these images' features, in order."""
        return runs == features

    def image_text(self, image: Vision, config) -> list[int]:
        """The ids the processor writes for one image, placeholders and markers."""
        raise NotImplementedError

    def video_runs(self, video: Vision, config) -> list[int]:
        """The runs of placeholders one video takes."""
        raise NotImplementedError

    def positions(self, core: nn.Module, prompt_ids: Tensor, vision: Vision) -> Tensor:
        """(A, P + 1) positions of one prompt and of a token of text after it."""
        return torch.arange(prompt_ids.numel() + 1).expand(self.axes, -1)

    def stock_inputs(
        self, config, ids: Tensor, vision: Vision, prompt: int | None = None
    ) -> dict[str, Tensor]:
        """What the stock forward of sequences (B, L) takes beside ids and attention mask; `prompt`
        is the number of tokens before the completion, None for all."""
        return {key: vision[key] for key in self.media_inputs if key in vision}

    serves_images_in_completions = False

    def at_the_prompt(self, vision: Vision, inside: Tensor) -> tuple[Vision, Vision]:
        """Of the images of a prompt and what follows it, those of the prompt and the others;
        `inside` (P,) bool says which of its tokens are an image's, each image a run of them."""
        starts = inside & ~torch.cat([inside.new_zeros(1), inside[:-1]])
        images, count = self.split_images(vision) if vision else [], int(starts.sum())
        prompt, after = images[:count], images[count:]
        return tuple(self.join_images(some) if some else {} for some in (prompt, after))

    def completion_positions(
        self, core: nn.Module, prompt_ids: Tensor, vision: Vision, completion: Tensor, own: Vision
    ) -> Tensor:
        """(A, C) positions of a completion that has images of its own behind its prompt."""
        raise NotImplementedError

    # -- the mask

    def two_way(self, config) -> bool:
        """Whether some tokens of a prompt see one another both ways."""
        return False

    local_blocks = False  # those blocks are blocks in sliding layers alone, inside the window

    def blocks(self, config, prompt_ids: Tensor) -> list[tuple[int, int]]:
        """Bounds of the blocks of a prompt whose tokens see one another both ways."""
        return []

    def head_dim(self, text) -> int:
        """The widest head of the decoder whose config is `text`."""
        given = getattr(text, "head_dim", None)
        return given or text.hidden_size // text.num_attention_heads

    # -- images and videos

    @property
    def media_inputs(self) -> tuple[str, ...]:
        """All that a prompt's `vision` may hold."""
        return (*self.vision_inputs, *self.video_inputs, *self.position_inputs)

    def has_images(self, vision: Mapping[str, Any]) -> bool:
        return _any(self.media_inputs, vision)

    def split_media(self, vision: Vision) -> list[Vision]:
        """The inputs of each image, then of each video of a prompt."""
        images = self.split_images(vision) if _any(self.vision_inputs, vision) else []
        return images + (self.split_videos(vision) if _any(self.video_inputs, vision) else [])

    def kind_of(self, inputs: Vision) -> str:
        """Whether these inputs are those of an "image" or of a "video"."""
        return "video" if _any(self.video_inputs, inputs) else "image"

    def check_vision(self, vision: Vision) -> None:
        """`InputError` when the processor's outputs do not fit one another."""

    def split_images(self, vision: Vision) -> list[Vision]:
        """The inputs of each image of a prompt (or of a batch of prompts), in order."""
        raise NotImplementedError

    def split_videos(self, vision: Vision) -> list[Vision]:
        """The inputs of each video of a prompt, in order."""
        raise NotImplementedError

    def join_images(self, images: Sequence[Vision]) -> Vision:
        """The tower's inputs for these images, or videos: what was split, together."""
        return {key: join([image[key] for image in images]) for key in images[0]}

    def company(self, config, images: Sequence[Vision]) -> list[Vision]:
        """What is encoded beside these images, where the model's own code fails on so few."""
        return []

    def split_rows(
        self, fields: Mapping[str, Any], num_images: Sequence[int] | None, num_rows: int
    ) -> list[Vision]:
        """A batch's inputs as one dict per row, {} for a row of text.

        `fields` are the processor's outputs by name, absent or None without images; `num_images`
        the images of each row.
        """
        given = {
            key: value
            for key, value in fields.items()
            if value is not None and key not in TEXT_OUTPUTS
        }
        if not any(len(value) for value in given.values()):
            return [{} for _ in range(num_rows)]
        unknown = sorted(set(given) - set(self.vision_inputs))
        missing = [key for key in self.vision_inputs if key not in given]
        if unknown or missing or num_images is None:
            raise InputError(
                f"images of family {self.name!r} come as {list(self.vision_inputs)} with "
                f"num_images, got {sorted(given)}"
                + (" without num_images" if num_images is None else "")
            )
        images = iter(self.split_images(given))
        rows = [[next(images) for _ in range(count)] for count in num_images]
        return [self.join_images(row) if row else {} for row in rows]

    def image_counts(
        self, config, prompts: Sequence[Sequence[int]], vision: Vision, num_images: Sequence[int]
    ) -> list[int]:
        """How many of the engine's images each row of a batch has, for `split_rows`."""
        return list(num_images)

    def blank_image(self, config, size: tuple[int, int] | None = None) -> Vision:
        """The tower's inputs for a black image: the smallest, or of `size`, in its own units."""
        raise NotImplementedError

    def blank_images(self, config, sizes: Sequence[tuple[int, int]]) -> list[Vision]:
        """Black images of one prompt, as the engine's units."""
        return [self.blank_image(config, size) for size in sizes]

    # -- where the features enter

    def encoder(self, core: nn.Module) -> nn.Module:
        """The module whose `get_image_features` and `get_video_features` the forward calls."""
        return core.model

    def tower(self, core: nn.Module) -> nn.Module | None:
        """The vision tower, of some families with the projector; None for a text model."""
        return None

    def split_features(self, output, images: Sequence[Vision]) -> tuple[list[Features], Join]:
        """What `get_image_features` returned for `images` (or the other for videos), one by one,
        and the way back: a function from any features to an output of the model's own class."""
        kind = type(output)
        return [[feature] for feature in output.pooler_output], lambda features: filled(
            kind, pooler_output=tuple(feature for (feature,) in features)
        )

    def mixers(self, core: nn.Module) -> list[nn.Module]:
        """The recurrent layers, which follow a row's layout through `fastgrpo.recurrence`."""
        return []

    def routers(self, core: nn.Module) -> list[nn.Module]:
        """The routers of a mixture of experts, which return their logits first."""
        return []

    # -- a model of this family small enough for tests

    def tiny_config(self, text: dict, vision: dict, ids: dict[str, int], **top):
        """A config whose sub-configs hold `text` and `vision`; `ids` are the special tokens."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.name, **text, **top)

    tiny_image_text = ""  # what its chat template writes for an image, before the processor

    def tiny_tokens(self, config) -> dict[str, tuple[str, int | None]]:
        """The tokens a processor asks its tokenizer for: attribute -> (text, id; None: any)."""
        return {}

    def tiny_processor(self, config, tokenizer, **options):
        """A processor of transformers whose images fit `tiny_config`; `options` are passed on."""
        raise NotImplementedError


def _any(names: Sequence[str], given: Mapping[str, Any]) -> bool:
    return any(name in given for name in names)
