# SPDX-License-Identifier: Apache-2.0
"""The families of this folder, found by looking: a file is added and its families are served."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from fastgrpo import models
from fastgrpo.errors import InputError
from fastgrpo.models.family import Family


@functools.cache
def families() -> dict[str, Family]:
    """Every family by `model_type`: the `FAMILIES` of each module in `fastgrpo.models`."""
    found = {}
    for info in pkgutil.iter_modules(models.__path__):
        module = importlib.import_module(f"{models.__name__}.{info.name}")
        for family in getattr(module, "FAMILIES", ()):
            if family.name in found:
                raise RuntimeError(f"two modules serve model type {family.name!r}")
            found[family.name] = family
    return dict(sorted(found.items()))


# Why a model type is not among the families, where there is more to say than that.
_AUDIO = "audio towers and the positions of interleaved audio are not implemented"
_LATENT = "multi-head latent attention has keys and values of different sizes"
_CONVOLUTION = "its short convolutions read the row's neighbouring tokens through another seam"
REFUSED = {
    "deepseek_v3": _LATENT,
    "gemma2": "its attention caps the scores, which no backend serves",
    "gemma3n": "its per-layer predictions and audio tower are not implemented",
    "kimi_k25": _LATENT,
    "kimi_linear": "its recurrence is another (Kimi delta attention), with latent attention",
    "lfm2": _CONVOLUTION,
    "lfm2_vl": _CONVOLUTION,
    "minicpmv4_6": "before transformers 5.23 its tower takes images of one size alone",
    "qwen2_5_omni": _AUDIO,
    "qwen2_5_omni_thinker": _AUDIO,
    "qwen3_omni_moe": _AUDIO,
    "qwen3_omni_moe_thinker": _AUDIO,
    "qwen4_exp": "its n-gram embeddings and a convolution read the tokens before each in the row",
}


def family_of(config) -> Family:
    """The family of a model config; `InputError` with the reason for one that is not served."""
    family = families().get(config.model_type)
    if family is None:
        raise InputError(
            f"model type {config.model_type!r} is not served{_because(config.model_type)}; "
            f"the packed forward is proved for {', '.join(families())}"
        )
    text = getattr(config, "text_config", None) or config
    if family.decoders is not None and text.model_type not in family.decoders:
        raise InputError(
            f"model type {config.model_type!r} is served with a text model of "
            f"{', '.join(family.decoders)}, not {text.model_type!r}{_because(text.model_type)}"
        )
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    unknown = [kind for kind in kinds if kind not in family.layer_kinds]
    if unknown:
        raise InputError(
            f"model type {config.model_type!r} has {unknown[0]!r} layers, which a packed row does "
            f"not serve: a layer that is not attention by the row's own mask mixes the tokens of "
            f"its neighbours"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    by_kind = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    for parameters in by_kind:
        kind = parameters.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise InputError(
                f"rope type {kind!r} rescales with the longest sequence of the batch: packing "
                f"other sequences next to one would change it"
            )
    family.check_config(config)
    return family


def _because(model_type: str) -> str:
    return f": {REFUSED[model_type]}" if model_type in REFUSED else ""
