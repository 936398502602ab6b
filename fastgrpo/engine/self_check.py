"""The first time a model is used, its packed forward is compared with the plain one."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgrpo.engine.forward import feature_store
from fastgrpo.engine.parallel import distributed
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.group import Group
from fastgrpo.packing.planner import Part
from fastgrpo.packing.row import PackedRow, check_prompt
from fastgrpo.packing.vision import idle_tower

# Largest mean difference of log-probs, in nats. Rounding gives about 1e-6 in float32 and 1e-2 in
# bfloat16; a wrong mask or position gives whole nats.
_FLOAT32, _HALF = 2e-3, 0.15

_checked: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class SelfCheckError(RuntimeError):
    """The packed forward of this model does not give the log-probs of its plain forward."""


def self_check(adapter: Adapter, groups: Sequence[Group], backend: str, score_row) -> None:
    """Score one completion packed next to another of its group, and alone by the stock forward.

    Runs once per model, backend, and presence of images; leaves random state, gradients, mode and
    the model's cached positions as they were. Raises `SelfCheckError` on disagreement.
    """
    done = _checked.setdefault(adapter.core, set())
    group = _candidate(adapter, groups)
    if group is None:
        return
    # Every rank must run the same number of forwards, whatever its first group looks like.
    key = (backend, bool(group.vision) and not distributed())
    if key in done:
        return
    check_prompt(adapter, group)
    filled = [c for c in group.completions if c.numel()]
    pair = Group(group.prompt_ids, [filled[0], filled[-1]], group.vision)
    part = Part(pair, [(0, 0), (0, 1)], pair.lengths)
    with _undisturbed(adapter):
        row = PackedRow(adapter, [part], [pair], backend)
        packed = score_row(adapter, row, 1.0, ("logp",), feature_store([row], detach=False))[0]
        packed = packed.split(row.lengths)[1]
        plain = _plain_logp(adapter, pair, pair.completions[1])
    error = float((packed.float() - plain.float()).abs().mean())
    exact = plain.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
        adapter.device.type
    )
    limit = _FLOAT32 if exact and not _reduced_float32() else _HALF
    if not error <= limit:
        raise SelfCheckError(
            f"{type(adapter.core).__name__}: log-probs of the packed forward (backend {backend!r}) "
            f"differ from the plain forward by {error:.3g} nats per token on average, {limit} at "
            f"most expected. Something changes this model's attention, positions or head in a way "
            f"packing does not know. backend='dense' tells whether it is the backend; "
            f"self_check=False turns this check off."
        )
    done.add(key)


def _candidate(adapter: Adapter, groups: Sequence[Group]) -> Group | None:
    """The shortest group with something to score, one with images if there is any."""

    def clean(c: Tensor) -> bool:
        return not torch.isin(c.cpu(), torch.tensor(adapter.placeholders)).any()

    usable = [
        g
        for g in groups
        if any(c.numel() for c in g.completions) and all(clean(c) for c in g.completions)
    ]
    usable.sort(key=lambda g: (not g.vision, g.prompt_ids.numel()))
    return usable[0] if usable else None


def _plain_logp(adapter: Adapter, group: Group, completion: Tensor) -> Tensor:
    """(C,) from the stock forward of one unpadded sequence; keeps (C + 1, V) logits only."""
    device = adapter.device
    ids = torch.cat([group.prompt_ids, completion])[None].to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    given = adapter.family.stock_inputs(adapter.config, ids, group.vision)
    inputs |= {key: value.to(device) for key, value in given.items()}
    has_images = adapter.family.has_images(group.vision)
    idle = adapter.family.vision_inputs and not has_images and distributed()
    with idle_tower(adapter) if idle else contextlib.nullcontext({}) as images:
        output = adapter.root(**inputs, **images, logits_to_keep=completion.numel() + 1)
    logits = (output.logits if hasattr(output, "logits") else output[0])[0, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(wide, -1).gather(-1, completion.to(device)[:, None])[:, 0]
    return logp.to(logits.dtype)


@contextlib.contextmanager
def _undisturbed(adapter: Adapter) -> Iterator[None]:
    base = getattr(adapter.core, "model", None)
    deltas = getattr(base, "rope_deltas", None)
    devices = [adapter.device] if adapter.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpointing warns that nothing needs a gradient
        try:
            yield
        finally:
            if hasattr(base, "rope_deltas"):
                base.rope_deltas = deltas


def _reduced_float32() -> bool:
    return torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
