"""The chunked linear_logprob as a custom op: forward, and backward by one of four plans.

Letters: N rows, D hidden size, V vocabulary.

    forward    1 matmul   no gradient wanted
    frozen     2 matmuls  the weight needs no gradient: forward makes u = dlogp/dhidden (N, D)
    keep       3 matmuls  forward keeps the exponentials (N, V), if the workspace holds them
    recompute  4 matmuls  backward makes the logits again (3 with a frozen head)
"""

import torch

from fastgrpo.ops._head import Chunk, Gradients, Head, bfloat16_products
from fastgrpo.reference.linear_logprob import IGNORE


@torch.library.custom_op("fastgrpo::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    inv_temperature: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    plan: str,
    impl: str,
    workspace_mb: float | None,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp (N,), entropy (N,) or (0,), kept, row statistics of plan keep, overflow count)."""
    head = Head(weight, bias, softcap, logit_scale, impl, group)
    N, wide = len(targets), head.acc_dtype
    logp = hidden.new_zeros(N, dtype=wide)
    H = hidden.new_zeros(N if entropy else 0, dtype=wide)
    kept, stats = _kept(hidden, head.weight, plan)
    clamped = hidden.new_zeros((), dtype=torch.int64)
    grads = Gradients(head, hidden, (plan == "frozen", False, False))
    if plan == "frozen":
        grads.dhidden = kept
    work = _Work(targets, head, workspace_mb)
    buffer = None if plan == "keep" and not head.half else head.buffer(work.step)
    for rows, part in work:
        x, y = head.rows(hidden, rows), targets[rows]
        inv_t = None if inv_temperature is None else inv_temperature[rows].to(wide)
        c = head.chunk(x, y, inv_t, kept[part] if buffer is None else buffer, entropy)
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
            if buffer is not None:
                kept[part] = c.exps
    if plan == "keep":
        kept[work.count :] = 0
    if plan == "frozen" and head.shard is not None:
        head.shard.sum(kept)
    return logp, H, kept, stats, clamped


@linear_logprob_op.register_fake
def _(hidden, weight, targets, bias, inv_t, softcap, scale, entropy, plan, impl, workspace, group):
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
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    inv_temperature: torch.Tensor | None,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    kept: torch.Tensor,
    stats: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    plan: str,
    impl: str,
    workspace_mb: float | None,
    group: str,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dhidden, dweight, dbias), empty where `need` is False."""
    head = Head(weight, bias, softcap, logit_scale, impl, group)
    if plan == "frozen":
        du = torch.where((targets != IGNORE)[:, None], dlogp[:, None] * kept, 0.0)
        empty = hidden.new_empty(0)
        return du.to(hidden.dtype), empty.to(weight.dtype), empty.clone()
    wide = head.acc_dtype
    grads = Gradients(head, hidden, tuple(need))
    work = _Work(targets, head, workspace_mb)
    buffer = head.buffer(work.step) if plan == "recompute" else None
    for rows, part in work:
        x, y = head.rows(hidden, rows), targets[rows]
        inv_t = None if inv_temperature is None else inv_temperature[rows].to(wide)
        if plan == "recompute":
            c = head.chunk(x, y, inv_t, buffer, dentropy is not None)
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
def _(dlogp, dentropy, hidden, weight, targets, bias, *args):
    need = args[-1]
    return (
        hidden.new_empty(hidden.shape if need[0] else 0),
        weight.new_empty(weight.shape if need[1] else 0),
        hidden.new_empty(0) if not need[2] else bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, inv_t, softcap, scale, _, plan, impl, workspace, group = inputs
    logp, entropy, kept, stats, clamped = output
    ctx.save_for_backward(hidden, weight, targets, bias, inv_t, logp, entropy, kept, stats)
    ctx.scalars = (softcap, scale, plan, impl, workspace, group)
    ctx.mark_non_differentiable(kept, stats, clamped)


def _backward(ctx, dlogp, dentropy, *_):
    hidden, weight, targets, bias, inv_t, logp, entropy, kept, stats = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    grads = linear_logprob_backward_op(
        dlogp,
        dentropy if entropy.numel() else None,
        hidden,
        weight,
        targets,
        bias,
        inv_t,
        logp,
        entropy,
        kept,
        stats,
        *ctx.scalars,
        need,
    )
    dhidden, dweight, dbias = (g if n else None for g, n in zip(grads, need, strict=True))
    return dhidden, dweight, None, dbias, *[None] * 8


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
