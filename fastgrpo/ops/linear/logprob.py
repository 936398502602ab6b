# SPDX-License-Identifier: Apache-2.0
"""linear_logprob: log-probabilities of targets without storing the (N, V) logits.

A custom op over chunks of rows; backward by one of four plans:

    forward    1 matmul   no gradient wanted
    frozen     2 matmuls  the weight needs no gradient: forward makes u = dlogp/dhidden (N, D)
    keep       3 matmuls  forward keeps the exponentials (N, V), if the workspace holds them
    recompute  4 matmuls  backward makes the logits again (3 with a frozen head)

Letters: N rows, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch

from fastgrpo.checks import check_choice
from fastgrpo.losses.tokens import IGNORE
from fastgrpo.ops.linear.head import Chunk, Gradients, Head, bfloat16_products, looks_at_each_chunk
from fastgrpo.ops.linear.inputs import Projection, projection
from fastgrpo.ops.linear.memory import keeps
from fastgrpo.reference import linear_logprob as reference


@dataclass(frozen=True)
class LinearLogprob:
    """logp (N,); entropy (N,) or None; plan: how the gradients are made (see linear_logprob).

    overflow: rows whose exponents left float32 about the target logit, recomputed safely.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None
    plan: str
    overflow: torch.Tensor


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
    impl: str | None = None,
    validate: bool | None = None,
    entropy_grad: bool = True,
    workspace_mb: float | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> LinearLogprob:
    """Log-probabilities of `targets` under softmax(hidden @ weight.T), the logits never stored.

        z      = hidden_n @ weight.T + bias
        f(z)   = softcap * tanh(logit_scale * z / softcap)      (logit_scale * z without a softcap)
        logp_n = log softmax(f(z) / temperature_n)[targets_n],   H_n = -sum_j p_nj log p_nj

    computed as -log1p(sum of exp about the target logit), so that a target whose probability is
    within 1e-7 of 1 keeps its log-prob and its gradient.

    Args:
        hidden: (N, D), weight: (V, D) of the same dtype; a DTensor weight is gathered. bias: (V,).
        targets: (N,) int64. -100: logp 0, no work, no gradient. Any other id outside [0, V):
            InputError naming the row on CPU or with validate=True; NaN in that row on CUDA.
        temperature: a number > 0, or (N,).
        outputs: "logp", and "entropy" if wanted; entropy_grad=False saves its backward work.
        impl: "reference", "torch", "cpp", "triton"; None picks the fastest there is.
        workspace_mb: memory for a chunk of logits (default 128, at least 512 rows; on a GPU 4096
            rows, fewer where memory is short), and for keeping the exponentials (default 512, on a
            GPU a sixteenth of its memory if that is free).
        process_group: the weight and bias are this rank's vocabulary shard, in rank order; hidden
            and targets are the same on all ranks, and so is every result but dweight and dbias.

    Returns LinearLogprob: logp, entropy float32 (float64 from float64 inputs), differentiable in
    hidden, weight and bias. plan: "forward" (1 matmul: nothing needs a gradient), "frozen" (2: the
    weight needs none), "keep" (3: the (N, V) exponentials fit the workspace), "recompute" (4), or
    "autograd" (the reference). A row of hidden with NaN or inf makes only that row NaN. On the
    same machine the result is bitwise reproducible.
    """
    for name in outputs:
        check_choice("outputs", name, ("logp", "entropy"))
    want_entropy = "entropy" in outputs
    head = projection(
        *("linear_logprob", hidden, weight, targets, bias, temperature, softcap, logit_scale),
        *(impl, validate, workspace_mb, process_group),
    )
    if head.impl == "reference":
        options = (bias, temperature, softcap, logit_scale, want_entropy)
        logp, entropy = reference.linear_logprob(hidden, head.weight, head.targets, *options)
        return LinearLogprob(logp, entropy, "autograd", head.targets.new_zeros(()))
    plan = _plan(head, want_entropy and entropy_grad)
    logp, entropy, _, _, overflow = linear_logprob_op(*head, want_entropy, plan)
    if want_entropy and not entropy_grad:
        entropy = entropy.detach()
    return LinearLogprob(logp, entropy if want_entropy else None, plan, overflow)


def _plan(head: Projection, entropy_grad: bool) -> str:
    hidden, weight, bias = head.hidden, head.weight, head.bias
    head_needs = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head_needs):
        return "forward"
    if not head_needs and not entropy_grad:
        return "frozen"
    itemsize = 2 if bfloat16_products(hidden) else max(4, hidden.dtype.itemsize)
    sizes = (hidden.shape[0], weight.shape[0], itemsize)
    return "keep" if keeps(*sizes, head.workspace_mb, hidden.device) else "recompute"


@torch.library.custom_op("fastgrpo::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    impl: str,
    workspace_mb: float | None,
    group: str,
    entropy: bool,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp (N,), entropy (N,) or (0,), kept, row statistics of plan keep, overflow count) of a
    `Projection`."""
    head = Head(weight, bias, softcap, logit_scale, impl, group)
    N, wide = len(targets), head.acc_dtype
    logp = hidden.new_zeros(N, dtype=wide)
    H = hidden.new_zeros(N if entropy else 0, dtype=wide)
    kept, stats = _kept(hidden, head.weight, plan)
    grads = Gradients(head, hidden, (plan == "frozen", False, False))
    if plan == "frozen":
        grads.dhidden = kept
    work = _Work(targets, head, workspace_mb)
    buffer = None if plan == "keep" and not head.half else head.buffer(work.step)

    def fill(safe: bool) -> torch.Tensor:
        clamped = targets.new_zeros(())
        for rows, part in work:
            x, y = head.rows(hidden, rows), targets[rows]
            inv_t = None if inv_temperature is None else inv_temperature[rows].to(wide)
            keep = kept[part] if plan == "keep" and buffer is not None else None
            memory = kept[part] if buffer is None else buffer
            c = head.chunk(x, y, inv_t, memory, entropy, safe, keep=keep)
            logp[rows] = c.logp
            if entropy:
                H[rows] = c.entropy
            clamped += c.overflow.sum()
            if plan == "frozen":
                E, v = head.weigh(c, y, inv_t, torch.ones_like(c.logp), None, in_place=True)
                grads.add(E, v, x, rows)
            elif plan == "keep":
                shift = torch.zeros_like(c.total) if c.shift is None else c.shift
                stats[part] = torch.stack([c.total, shift, c.target_logit], 1)
        return clamped

    clamped = head.until_safe(fill)
    if plan == "keep":
        kept[work.count :] = 0
    if plan == "frozen" and head.shard is not None:
        head.shard.sum(kept)
    return logp, H, kept, stats, clamped


@linear_logprob_op.register_fake
def _(hidden, weight, bias, targets, inv_t, softcap, scale, impl, workspace, group, entropy, plan):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    N = hidden.shape[0]
    return (
        hidden.new_empty(N, dtype=wide),
        hidden.new_empty(N if entropy else 0, dtype=wide),
        *_kept(hidden, weight, plan),
        hidden.new_empty((), dtype=torch.int64),
    )


def _kept(
    hidden: torch.Tensor, weight: torch.Tensor, plan: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for what a plan keeps: u or the exponentials, and (Z, shift, f(z_y)) of each row."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    stats = hidden.new_zeros(hidden.shape[0] if plan == "keep" else 0, 3, dtype=wide)
    if plan == "frozen":
        return hidden.new_zeros(hidden.shape, dtype=wide), stats
    if plan == "keep":
        dtype = torch.bfloat16 if bfloat16_products(hidden) else wide
        return hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=dtype), stats
    return hidden.new_empty(0, dtype=wide), stats


@torch.library.custom_op("fastgrpo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    dlogp: torch.Tensor,
    dentropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    kept: torch.Tensor,
    stats: torch.Tensor,
    overflow: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    impl: str,
    workspace_mb: float | None,
    group: str,
    plan: str,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dhidden, dweight, dbias), empty where `need` is False."""
    head = Head(weight, bias, softcap, logit_scale, impl, group)
    if plan == "frozen":
        du = torch.where((targets != IGNORE)[:, None], dlogp[:, None] * kept, 0.0)
        empty = hidden.new_empty(0)
        return du.to(hidden.dtype), empty.to(weight.dtype), empty.clone()
    wide = head.acc_dtype
    # Exponentials that need no other factor along a row make each gradient in one matmul.
    at_once = plan == "keep" and dentropy is None and softcap is None
    grads = Gradients(head, hidden, tuple(need), at_once=at_once)
    work = _Work(targets, head, workspace_mb)
    work.step = max(work.count, 1) if at_once else work.step
    buffer = head.buffer(work.step) if plan == "recompute" else None
    safe = plan == "recompute" and (looks_at_each_chunk(hidden.device) or bool(overflow))
    for rows, part in work:
        x, y = head.rows(hidden, rows), targets[rows]
        inv_t = None if inv_temperature is None else inv_temperature[rows].to(wide)
        if plan == "recompute":
            c = head.chunk(x, y, inv_t, buffer, dentropy is not None, safe)
        else:
            total, shift, zy = stats[part].unbind(1)
            H = None if dentropy is None else entropy[rows]
            c = Chunk(kept[part], total, shift, logp[rows], H, zy, shift > 0)
        h = None if dentropy is None else dentropy[rows]
        E, v = head.weigh(c, y, inv_t, dlogp[rows].to(wide), h, in_place=plan == "recompute")
        grads.add(E, v, x, rows)
    dhidden, dweight, dbias = grads.finish()
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias


@linear_logprob_backward_op.register_fake
def _(dlogp, dentropy, hidden, weight, bias, *args):
    need = args[-1]
    return (
        hidden.new_empty(hidden.shape if need[0] else 0),
        weight.new_empty(weight.shape if need[1] else 0),
        hidden.new_empty(0) if not need[2] else bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    kept, stats, clamped = output[2:]
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.scalars = (*inputs[5:10], inputs[11])
    ctx.mark_non_differentiable(kept, stats, clamped)
    # Without this, backward is handed a (N, V) tensor of zeros for the exponentials kept.
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogp, dentropy, *_):
    if dlogp is None and dentropy is None:
        return (None,) * 12
    logp, need = ctx.saved_tensors[5], list(ctx.needs_input_grad[:3])
    dlogp = torch.zeros_like(logp) if dlogp is None else dlogp
    grads = linear_logprob_backward_op(dlogp, dentropy, *ctx.saved_tensors, *ctx.scalars, need)
    return *(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * 9


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)


class _Work:
    """Chunks of the rows that have a target: (rows of hidden, position among those rows)."""

    def __init__(self, targets: torch.Tensor, head: Head, workspace_mb: float | None) -> None:
        N = len(targets)
        rows = (targets != IGNORE).nonzero()[:, 0]
        self.count = len(rows)
        self.index = None if self.count == N else rows
        self.step = head.chunk_rows(self.count, workspace_mb)

    def __iter__(self):
        for start in range(0, self.count, self.step):
            part = slice(start, min(start + self.step, self.count))
            yield part if self.index is None else self.index[part], part
