# SPDX-License-Identifier: Apache-2.0
"""The first time a model is used, its packed forward and backward are compared with the plain ones.

Log-probs tell wrong positions, masks and heads; gradients tell a graph that is cut.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastgrpo.engine.forward import feature_store
from fastgrpo.engine.parallel import distributed, in_shards
from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.group import Group
from fastgrpo.packing.planner import Part
from fastgrpo.packing.row import PackedRow, check_prompt
from fastgrpo.packing.vision import idle_tower

logger = logging.getLogger(__name__)

# Largest mean difference of log-probs, in nats, and of a parameter's gradient, relative, exactly
# computed or in half precision (TF32 included). Rounding gives about 1e-6 and 1e-5 in float32, 1e-2
# and 1e-1 in bfloat16; a wrong mask or position gives whole nats, a cut gradient 1.
LOGP_TOLERANCE = {True: 1e-3, False: 0.1}
GRADIENT_TOLERANCE = {True: 2e-2, False: 0.5}
CHECKED_TOKENS = 16  # of a completion whose gradients are compared

_checked: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class SelfCheckError(RuntimeError):
    """The packed computation of this model does not give what the plain one gives."""


def check_logps(packed: Tensor, plain: Tensor, exact: bool, what: str) -> float:
    """The largest absolute difference; `SelfCheckError` where the mean cannot be rounding."""
    error = (packed.detach().float() - plain.detach().float()).abs()
    largest, mean, limit = float(error.max()), float(error.mean()), LOGP_TOLERANCE[exact]
    if not mean <= limit:
        raise SelfCheckError(
            f"{what}: max {largest:.3g}, mean {mean:.3g} nats over {error.numel()} tokens, a mean "
            f"of {limit} at most expected. Something changes this model's attention, positions or "
            "head in a way packing does not know. backend='dense' tells whether it is the backend; "
            "self_check=False turns this check off."
        )
    return largest


def check_gradients(
    adapter: Adapter,
    packed: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    *,
    images: bool,
    exact: bool,
) -> None:
    """Compares the gradients of sum_t s_t logp_t, s_t random in +-[0.5, 1.5], of both computations.

    `packed` and `plain` give the (N,) log-probs of the same tokens; without `images` among them the
    tower and its projector are left out. `SelfCheckError` names a parameter whose gradient differs
    or does not arrive, `InputError` says when no trainable parameter of these, or of the decoder,
    has any gradient even in the plain computation. `.grad` is left as it was.
    """
    own = adapter.before_decoder()
    named = [
        (name, p)
        for name, p in adapter.core.named_parameters()
        if p.requires_grad and (images or id(p) not in own)
    ]
    own_backward = in_shards(adapter.root)
    own_backward = own_backward or any(p._post_accumulate_grad_hooks for _, p in named)
    if not named or own_backward:
        return  # gradients that a wrapper reduces, or an optimizer takes, as they arrive
    sides = [[n for n, p in named if (id(p) in own) == inside] for inside in (True, False)]
    probes = {name for side in sides for name in side[:1] + side[-1:]}
    got, expected = (_gradients(named, side, probes) for side in (packed, plain))
    _refuse_dead(sides, expected)
    for name, grad in expected.items():
        if grad is not None:
            _check_gradient(name, got[name], grad, GRADIENT_TOLERANCE[exact])


def _check_gradient(name: str, packed: Tensor | None, plain: Tensor, limit: float) -> None:
    """Both are empty where only their arrival counts."""
    if packed is None:
        raise SelfCheckError(f"{name}: its gradient does not arrive through the packed row")
    error = float((packed - plain).norm() / plain.norm().clamp(min=1e-12))
    if not error <= limit:
        raise SelfCheckError(
            f"{name}: its gradient through the packed row differs from the plain one by "
            f"{error:.3g} of its norm, {limit} at most expected; self_check=False turns this "
            "check off"
        )


def _gradients(
    named: Sequence[tuple[str, nn.Parameter]], logps: Callable[[], Tensor], probes: set[str]
) -> dict[str, Tensor | None]:
    """Each parameter's gradient of the signed sum: float32 for `probes`, else only whether any."""
    kept = [p.grad for _, p in named]
    try:
        for _, p in named:
            p.grad = None
        logp = logps()
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, logp.shape, generator=generator) * 2 - 1
        # Of many sizes: two equal completions with weights 1 and -1 would leave rounding alone.
        weights = signs * (torch.rand(logp.shape, generator=generator) + 0.5)
        (logp * weights.to(logp)).sum().backward()
        found = {}
        for name, p in named:
            arrived = p.grad is not None and name in probes
            found[name] = p.grad.detach().float().clone() if arrived else None
            if p.grad is not None and not arrived:
                found[name] = p.grad.new_zeros(0)
        return found
    finally:
        for (_, p), grad in zip(named, kept, strict=True):
            p.grad = grad


def _refuse_dead(sides: list[list[str]], gradients: dict[str, Tensor | None]) -> None:
    """Names the trainable parameters that nothing would train."""
    for side in sides:
        dead = [name for name in side if gradients[name] is None]
        if not dead:
            continue
        some = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
        if len(dead) == len(side):
            raise InputError(
                f"parameters that require a gradient and get none: {some}. Under reentrant "
                "activation checkpointing an adapter needs inputs that require a gradient: use "
                "use_reentrant=False, or freeze them"
            )
        logger.warning("parameters that require a gradient and get none: %s", some)


def self_check(adapter: Adapter, groups: Sequence[Group], backend: str, score_row) -> None:
    """Two completions packed next to each other against the stock forward of each alone.

    Runs once per model, backend, presence of images and of gradients; leaves random state, `.grad`,
    mode and the model's cached positions as they were. Gradients are compared where one process
    holds the whole model: elsewhere backward is a collective. Raises `SelfCheckError`, and
    `InputError` for parameters that nothing would train.
    """
    done = _checked.setdefault(adapter.core, set())
    group = _candidate(adapter, groups)
    if group is None:
        return
    # Every rank must run the same number of forwards, whatever its first group looks like.
    images = bool(group.vision) and not distributed()
    gradients = torch.is_grad_enabled() and not distributed()
    if (backend, images, gradients) in done or (backend, images, True) in done:
        return
    check_prompt(adapter, group)
    filled = [c[:CHECKED_TOKENS] for c in group.completions if c.numel()]
    pair = Group(group.prompt_ids, [filled[0], filled[-1]], group.vision)
    part = Part(pair, [(0, 0), (0, 1)], pair.lengths)

    def packed() -> Tensor:
        row = PackedRow(adapter, [part], [pair], backend)
        return score_row(adapter, row, 1.0, ("logp",), feature_store([row], detach=False))[0]

    def plain() -> Tensor:
        return torch.cat(
            [_plain_logp(adapter, pair, completion) for completion in pair.completions]
        )

    with _undisturbed(adapter):
        with torch.no_grad():
            ours, theirs = packed(), plain()
        exact = computed_exactly(theirs.dtype, adapter.device.type)
        what = (
            f"{type(adapter.core).__name__}: log-probs of the packed forward (backend {backend!r}) "
            "differ from the plain forward"
        )
        check_logps(ours, theirs, exact, what)
        if gradients:
            check_gradients(adapter, packed, plain, images=images, exact=exact)
    done.add((backend, images, gradients))


def computed_exactly(dtype: torch.dtype, device: str) -> bool:
    """Whether matmuls are computed in float32 or better."""
    full = dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device)
    reduced = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return full and not reduced


def _candidate(adapter: Adapter, groups: Sequence[Group]) -> Group | None:
    """The shortest group with something to score, one with images if there is any."""

    def clean(c: Tensor) -> bool:
        return not torch.isin(c, torch.tensor(adapter.placeholders)).any()

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
    prompt = group.prompt_ids.numel()
    given = adapter.family.stock_inputs(adapter.config, ids, group.vision, prompt)
    inputs |= {key: value.to(device) for key, value in given.items()}
    has_images = adapter.family.has_images(group.vision)
    idle = adapter.family.vision_inputs and not has_images and distributed()
    with idle_tower(adapter) if idle else contextlib.nullcontext({}) as images:
        # As a tensor: given a number, Gemma 4 cuts the queries of its last layers, whose masks
        # are then wrong under an attention it does not know by name.
        kept = torch.arange(group.prompt_ids.numel() - 1, ids.shape[1], device=device)
        output = adapter.root(**inputs, **images, logits_to_keep=kept)
    logits = (output.logits if hasattr(output, "logits") else output[0])[0]
    logits = logits[-len(kept) : -1]  # all of them, from a model that does not know logits_to_keep
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(wide, -1).gather(-1, completion.to(device)[:, None])[:, 0]
    return logp.to(logits.dtype)


@contextlib.contextmanager
def _undisturbed(adapter: Adapter) -> Iterator[None]:
    base = getattr(adapter.core, "model", None)
    deltas = getattr(base, "rope_deltas", None)
    devices = [adapter.device] if adapter.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpointing warns that nothing needs a gradient
        try:
            yield
        finally:
            if hasattr(base, "rope_deltas"):
                base.rope_deltas = deltas
