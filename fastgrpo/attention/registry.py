# SPDX-License-Identifier: Apache-2.0
"""Attention over a packed row, switched into a stock transformers model.

`install` registers functions with transformers' AttentionInterface and selects them in the model's
config. With a layout among the forward's keyword arguments they attend by it; without one
(generation, other users of the model) they hand over to the implementation the model had before.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.attention.vision import vision_attention
from fastgrpo.errors import InputError
from fastgrpo.ops.autocast import under_autocast

# The names must not contain "flash", "flex" or "sdpa" (transformers treats those specially) -
# except the vision tower's, which must contain "flash": only then does the tower make one
# variable-length call instead of a Python loop over images and windows.
_TEXT_NAME, _VISION_NAME = "fastgrpo_group", "fastgrpo_flash_vision"
_fallbacks: dict[str, str] = {}  # registered name -> the implementation it hands over to


class Backend(NamedTuple):
    """`attend(query (T, H, D), key (T, K, D), value (T, K, D), layout, *, scale, window) ->
    (T, H, D)`, `unavailable(device, dtype, head_dim)` -> the reason, or None, and whether it serves
    layouts with `blocks`."""

    attend: Callable
    unavailable: Callable[[torch.device, torch.dtype, int], str | None]
    serves_blocks: bool


# name -> module with `attend` and `unavailable`; imported on first use. In order of preference:
# flash-attn before the own kernel until a measurement (bench_shared_prefix_attention) says
# otherwise; xformers, which cannot do sliding windows, only when asked for. Tokens that see one
# another in both directions (`GroupLayout.blocks`) are in a mask, which two of them take.
BACKENDS = {
    "flash_attn": "fastgrpo.attention.flash_attn",
    "triton": "fastgrpo.attention.triton",
    "torch_varlen": "fastgrpo.attention.torch_varlen",
    "prefix_cpu": "fastgrpo.attention.prefix_cpu",
    "kvgather": "fastgrpo.attention.kvgather",
    "dense": "fastgrpo.attention.dense",
    "xformers": "fastgrpo.attention.xformers",
}
_WITH_BLOCKS = ("kvgather", "dense")


def get_backend(name: str) -> Backend:
    """The backend of this name; `InputError` when there is none."""
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    module = importlib.import_module(BACKENDS[name])
    return Backend(module.attend, module.unavailable, name in _WITH_BLOCKS)


def choose_backend(
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    blocks: bool = False,
) -> str:
    """The name itself if it can serve, else `InputError` with the reason; None: the best.

    blocks: the model's prompts have tokens that see one another in both directions.
    """
    if name is not None:
        reason = _unavailable(name, device, dtype, head_dim, blocks)
        if reason:
            raise InputError(f"backend={name!r} cannot serve: {reason}")
        return name
    for candidate in BACKENDS:
        if _unavailable(candidate, device, dtype, head_dim, blocks) is None:
            return candidate
    raise InputError(f"no attention backend serves {device} {dtype}")


def _unavailable(name: str, device, dtype, head_dim: int, blocks: bool) -> str | None:
    backend = get_backend(name)
    if blocks and not backend.serves_blocks:
        return f"it has no tokens that see both ways; {' and '.join(_WITH_BLOCKS)} have"
    return backend.unavailable(device, dtype, head_dim)


def install(model, *, tower: bool = False) -> None:
    """Route the attention of a transformers model's text layers through us, and with `tower` that
    of a vision tower whose blocks pass `cu_seq_lens_q`."""
    config = model.config
    text = getattr(config, "text_config", None)
    if text is None:
        model.set_attn_implementation(_register(_TEXT_NAME, config, _group_attention))
        return
    names = {"text_config": _register(_TEXT_NAME, text, _group_attention)}
    if tower:
        names["vision_config"] = _register(_VISION_NAME, config.vision_config, _vision_attention)
    model.set_attn_implementation(names)


def uninstall(model) -> None:
    """Give the model back the attention implementations it had before `install`."""
    config = model.config
    text = getattr(config, "text_config", None)
    if text is None:
        model.set_attn_implementation(_original(config))
        return
    names = {"text_config": _original(text)}
    if getattr(config, "vision_config", None) is not None:
        names["vision_config"] = _original(config.vision_config)
    model.set_attn_implementation(names)


def is_installed(model) -> bool:
    config = getattr(model.config, "text_config", None) or model.config
    return config._attn_implementation in _fallbacks


def _original(config) -> str:
    return _fallbacks.get(config._attn_implementation, config._attn_implementation)


def _register(prefix: str, config, make: Callable) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    fallback = config._attn_implementation
    if fallback in _fallbacks:
        return fallback
    known = [name for name, value in _fallbacks.items() if name.startswith(prefix)]
    for name in known:
        if _fallbacks[name] == fallback:
            return name
    name = f"{prefix}_{len(known)}"
    _fallbacks[name] = fallback
    AttentionInterface.register(name, make(fallback))
    # Without a layout the stock implementation runs, and needs the mask made for it.
    if fallback in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[fallback])
    return name


def _stock(fallback: str, module) -> Callable:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if fallback == "eager":  # each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[fallback]


def _group_attention(fallback: str) -> Callable:
    def attention(
        module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        fg_layout=None,
        softcap: float | None = None,
        **kwargs,
    ):
        if fg_layout is None:
            kwargs |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
            kwargs |= {} if softcap is None else {"softcap": softcap}
            return _stock(fallback, module)(module, query, key, value, attention_mask, **kwargs)
        if softcap is not None:
            raise InputError(f"attention scores capped by {softcap} are not served in a packed row")
        _check_call(query, key, attention_mask, dropout, fg_layout)
        # A rollout's state attends by itself; a GroupLayout names a backend.
        own = getattr(fg_layout, "attend", None)
        attend = functools.partial(own, module) if own else _attend_of(fg_layout)
        # Rotary embeddings leave float32 queries and keys beside values in autocast's dtype.
        inputs = under_autocast(query[0], key[0], value[0])
        out = attend(
            *(x.transpose(0, 1) for x in inputs),
            fg_layout,
            scale=scaling,
            window=sliding_window,
        )
        return out[None], None

    return attention


def _attend_of(layout) -> Callable:
    backend = get_backend(layout.backend)
    if layout.blocks and not backend.serves_blocks:
        raise InputError(
            f"backend={layout.backend!r} cannot serve tokens {layout.blocks[0]}, which see one "
            f"another in both directions; {' and '.join(_WITH_BLOCKS)} can"
        )
    return backend.attend


def _check_call(query, key, attention_mask, dropout, layout):
    """What a layout cannot express must not be ignored in silence."""
    if query.shape[0] != 1 or query.shape[2] != layout.total or key.shape[2] != layout.total:
        raise InputError(
            f"a packed row has batch 1 and {layout.total} tokens, got query {tuple(query.shape)} "
            f"and key {tuple(key.shape)}"
        )
    if attention_mask is not None and attention_mask.numel() != 1:
        raise InputError(
            f"attention_mask {tuple(attention_mask.shape)} was given next to a layout; the layout "
            f"alone says which tokens see which"
        )
    if dropout:
        raise InputError(f"attention dropout must be 0 with a packed row, got {dropout}")


def _vision_attention(fallback: str) -> Callable:
    return vision_attention
