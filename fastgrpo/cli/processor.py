# SPDX-License-Identifier: Apache-2.0
"""The model's processor with the run's limits on image sizes, before any weight is loaded."""

from __future__ import annotations

from trl import ModelConfig

from fastgrpo.cli.config import FastGRPOConfig
from fastgrpo.errors import InputError

EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
# Attributes under which processors keep the literal tokens that stand for images in their prompts.
_TOKEN_NAMES = ("image", "video", "audio", "boi", "eoi", "vision_start", "vision_end")


def load_processor(config: FastGRPOConfig, model_config: ModelConfig):
    """The model's processor, padding on the left, with `min_pixels`, `max_pixels` and `max_tiles`
    applied.

    Raises `InputError` for limits that are not above zero, contradict each other or the
    processor's own, are smaller than the pixels of one image token, or do not suit how the
    processor sizes images.
    """
    from transformers import AutoProcessor

    name = model_config.model_name_or_path
    chosen = {
        limit: getattr(config, limit) for limit in EDGES if getattr(config, limit) is not None
    }
    for limit, pixels in chosen.items():
        if pixels < 1:
            raise InputError(f"{limit}: expected a number of pixels above 0, got {pixels}")
    if len(chosen) == 2 and chosen["min_pixels"] > chosen["max_pixels"]:
        raise InputError(
            f"min_pixels: {config.min_pixels} is above max_pixels, {config.max_pixels}"
        )
    try:
        processor = AutoProcessor.from_pretrained(
            name,
            revision=model_config.model_revision,
            trust_remote_code=config.trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model_name_or_path: no processor in {name!r}: {reason}") from error
    if chosen:
        _limit_pixels(getattr(processor, "image_processor", None), chosen, name)
    if config.max_tiles is not None:
        _limit_tiles(getattr(processor, "image_processor", None), config.max_tiles, name)
    return processor


def image_tokens(processor) -> list[str]:
    """The literal tokens of `processor` a text must not hold, or it is taken for an image."""
    owners = (processor, getattr(processor, "tokenizer", None))
    found = (getattr(o, f"{name}_token", None) for o in owners for name in _TOKEN_NAMES)
    return list(dict.fromkeys(token for token in found if isinstance(token, str) and token))


def _limit_pixels(image_processor, chosen: dict[str, int], name: str) -> None:
    """Sets the limits of a processor that sizes images by their number of pixels."""
    if image_processor is None or not {*EDGES.values()} <= dict(image_processor.size).keys():
        raise InputError(
            f"{', '.join(chosen)}: the processor of {name} does not size images by their number "
            "of pixels"
        )
    size = dict(image_processor.size)
    low = chosen.get("min_pixels", size["shortest_edge"])
    high = chosen.get("max_pixels", size["longest_edge"])
    if low > high and "max_pixels" in chosen:
        raise InputError(
            f"max_pixels: {high} is below the processor's own minimum of {low} pixels; "
            "set min_pixels as well"
        )
    if low > high:
        raise InputError(
            f"min_pixels: {low} is above the processor's own maximum of {high} pixels; "
            "set max_pixels as well"
        )
    unit = (image_processor.patch_size * getattr(image_processor, "merge_size", 1)) ** 2
    if high < unit:
        raise InputError(f"max_pixels: {high} is less than the {unit} pixels of one image token")
    image_processor.size = size | {"shortest_edge": low, "longest_edge": high}


def _limit_tiles(image_processor, count: int, name: str) -> None:
    """Sets the limit of a processor that cuts images into tiles."""
    if getattr(image_processor, "max_patches", None) is None:  # transformers' name for tiles
        raise InputError(f"max_tiles: the processor of {name} does not cut images into tiles")
    low = image_processor.min_patches
    if count < low:
        raise InputError(f"max_tiles: expected at least the processor's own {low}, got {count}")
    image_processor.max_patches = count
