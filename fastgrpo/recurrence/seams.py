# SPDX-License-Identifier: Apache-2.0
"""The two functions of a modeling file that a recurrent mixer calls, wrapped.

A mixer of transformers calls `causal_conv1d_fn` and `torch_chunk_gated_delta_rule` by their names
in its module and hands the forward's keyword arguments to both. With a layout among them the
wrapped functions follow it; without one (generation by transformers, other users) they hand over.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fastgrpo.recurrence.branches import convolve, delta_rule

CONVOLUTION, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
STEP = "torch_recurrent_gated_delta_rule"  # the same rule, made for a token at a time

LIBRARIES = {CONVOLUTION: "causal_conv1d", RULE: "fla"}  # whose kernels transformers takes

_counters: list[Counter] = []


class RecurrenceError(RuntimeError):
    """A recurrent layer did not follow the packed row's layout."""


def install(mixers: Sequence[nn.Module]) -> None:
    """Wrap the two functions in the modules that define these mixers, once."""
    for module in {sys.modules[type(mixer).__module__] for mixer in mixers}:
        for name, wrap in ((CONVOLUTION, _convolution), (RULE, _rule)):
            function = getattr(module, name, None)
            if function is None:
                raise RecurrenceError(f"{module.__name__} has no {name}: another transformers?")
            if not hasattr(function, "fastgrpo_original"):
                wrapped = wrap(function, module)
                wrapped.fastgrpo_original = function
                setattr(module, name, wrapped)


def uninstall(mixers: Sequence[nn.Module]) -> None:
    """Give the modules of these mixers their own functions back."""
    for module in {sys.modules[type(mixer).__module__] for mixer in mixers}:
        for name in (CONVOLUTION, RULE):
            function = getattr(module, name)
            setattr(module, name, getattr(function, "fastgrpo_original", function))


def implementations(device: torch.device) -> dict[str, dict]:
    """Per seam, what runs it on `device` and why the other does not, for `fastgrpo doctor`."""
    found = {}
    for seam, library in LIBRARIES.items():
        if importlib.util.find_spec(library) is not None:
            found[seam] = {"uses": library, "others": {}}
            continue
        slow = "; the fallback is many times slower on a GPU" if device.type == "cuda" else ""
        found[seam] = {"uses": "torch", "others": {library: f"not installed{slow}"}}
    return found


@contextlib.contextmanager
def counted_calls(mixers: Sequence[nn.Module]) -> Iterator[None]:
    """Around one forward with a layout: raises unless every mixer came through both functions."""
    calls = Counter()
    _counters.append(calls)
    try:
        yield
    finally:
        _counters.remove(calls)
    for name in (CONVOLUTION, RULE):
        if calls[name] != len(mixers):
            raise RecurrenceError(
                f"{calls[name]} of {len(mixers)} {type(mixers[0]).__name__} layers called "
                f"{name} of their own module: something (a kernel, torch.compile, another "
                f"library) replaced their forward, and state would leak between completions. "
                f"Load the model without it."
            )


def _count(name: str) -> None:
    for calls in _counters[-1:]:  # none while a backward pass recomputes a layer
        calls[name] += 1


def _convolution(original, module):
    @functools.wraps(original)
    def causal_conv1d_fn(
        hidden_states, weight, bias=None, activation=None, fg_layout=None, **kwargs
    ):
        if fg_layout is None:
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        _count(CONVOLUTION)
        given = (original, hidden_states, weight, bias, activation)
        if hasattr(fg_layout, "convolve"):  # a rollout's state
            return fg_layout.convolve(*given)
        return convolve(*given, fg_layout)

    return causal_conv1d_fn


def _rule(original, module):
    @functools.wraps(original)
    def torch_chunk_gated_delta_rule(query, key, value, g, beta, fg_layout=None, **kwargs):
        if fg_layout is None:
            return original(query, key, value, g=g, beta=beta, **kwargs)
        _count(RULE)
        options = {"use_qk_l2norm_in_kernel": kwargs.get("use_qk_l2norm_in_kernel", False)}
        inputs = (query, key, value, g, beta)
        if hasattr(fg_layout, "delta_rule"):  # a rollout's state
            return fg_layout.delta_rule(original, getattr(module, STEP), inputs, **options), None
        return delta_rule(original, inputs, fg_layout, **options), None

    return torch_chunk_gated_delta_rule
