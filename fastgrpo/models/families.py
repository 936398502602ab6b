"""The allow-list: model families whose packed forward is proved equal to the plain one."""

from __future__ import annotations

from dataclasses import dataclass

from fastgrpo.errors import InputError


@dataclass(frozen=True)
class Family:
    """What one transformers model type needs from the packed row.

    `mrope`: positions have three axes and images occupy a grid; `images`: the processor outputs
    that describe images, in the order the vision tower takes them.
    """

    name: str
    mrope: bool = False
    images: tuple[str, ...] = ()


_QWEN_IMAGES = ("pixel_values", "image_grid_thw")
FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_vl", mrope=True, images=_QWEN_IMAGES),
        Family("qwen2_5_vl", mrope=True, images=_QWEN_IMAGES),
        Family("qwen3_vl", mrope=True, images=_QWEN_IMAGES),
        Family("qwen2"),
        Family("qwen3"),
        Family("llama"),
    )
}

_RECURRENT = ("linear_attention", "conv", "mamba", "recurrent")
_ATTENTION = ("full_attention", "sliding_attention")


def family_of(config) -> Family:
    """The family of a model config; `InputError` with the reason for one that is not served."""
    text = getattr(config, "text_config", None) or config
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    recurrent = [kind for kind in kinds if any(word in kind for word in _RECURRENT)]
    if recurrent:
        raise InputError(
            f"model type {config.model_type!r} has {recurrent[0]} layers: their state runs through "
            f"the tokens one after another, so completions cannot share one copy of the prompt"
        )
    if config.model_type not in FAMILIES:
        raise InputError(
            f"model type {config.model_type!r} is not served; the packed forward is proved for "
            f"{', '.join(FAMILIES)}"
        )
    unknown = [kind for kind in kinds if kind not in _ATTENTION]
    if unknown:
        raise InputError(f"{config.model_type!r} has layers of an unknown kind {unknown[0]!r}")
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    if kind in ("dynamic", "longrope"):
        raise InputError(
            f"rope type {kind!r} rescales with the longest sequence of the batch: packing other "
            f"sequences next to one would change it"
        )
    return FAMILIES[config.model_type]
