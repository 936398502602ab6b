# SPDX-License-Identifier: Apache-2.0
"""The one-pass linear_grpo_loss: loss and gradients made in forward, as a custom op.

Letters: N rows, D hidden size, V vocabulary, B sequences.

A chunk's gradient needs only the log-probs of the chunk where the objective treats tokens apart,
and those of whole sequences where it couples them. So chunks are cut at sequence edges when it
does, and each chunk of exponentials is used for both gradients while it is still there: three
matmuls. A sequence longer than a chunk, and an objective that needs a statistic of all tokens
(top_entropy_quantile), take two passes over their chunks: four.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgrpo.losses.tokens import Scales, Tokens
from fastgrpo.objective import KLTerm, Objective
from fastgrpo.ops.grpo_loss import LossCall
from fastgrpo.ops.linear.head import Chunk, Gradients, Head, looks_at_each_chunk
from fastgrpo.ops.linear.inputs import Projection
from fastgrpo.ops.select import constant_when_compiled


@torch.library.custom_op("fastgrpo::linear_grpo_loss", mutates_args=())
def linear_grpo_op(
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
    columns: list[torch.Tensor],
    num_rows: int,
    spec: str,
    need: list[bool],
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """(loss, stats, logp, dhidden, dweight, dbias, overflow count, entropy (N,) or (0,)).

    columns and spec: `pack`.
    """
    head = Projection(
        hidden, weight, bias, targets, inv_temperature, softcap, logit_scale, impl, workspace_mb,
        group,
    )  # fmt: skip
    return run(head, unpack(columns, spec, num_rows, hidden), need)


@linear_grpo_op.register_fake
def _(hidden, weight, bias, targets, inv_t, softcap, scale, impl, workspace, group, columns,
      num_rows, spec, need):  # fmt: skip
    call = unpack(columns, spec, num_rows, hidden)
    wide = call.tokens.logp.dtype
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(call.names), 2, dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if need[0] else 0, dtype=wide),
        weight.new_empty(weight.shape if need[1] else 0, dtype=wide),
        hidden.new_empty(weight.shape[0] if need[2] else 0, dtype=wide),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(0 if call.tokens.entropy is None else hidden.shape[0], dtype=wide),
    )


def _setup_context(ctx, inputs, output) -> None:
    _, stats, logp, dhidden, dweight, dbias, clamped, entropy = output
    ctx.save_for_backward(dhidden, dweight, dbias)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.num_columns = len(inputs[10])
    ctx.mark_non_differentiable(stats, logp, dhidden, dweight, dbias, clamped, entropy)
    # Without this, backward is handed a (V, D) tensor of zeros for the dweight among the outputs.
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    none = (*[None] * 7, [None] * ctx.num_columns, *[None] * 3)
    if dloss is None:
        return None, None, None, *none
    grads = [
        scaled(grad, dloss, dtype) if needed else None
        for grad, dtype, needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True
        )
    ]
    return *grads, *none


linear_grpo_op.register_autograd(_backward, setup_context=_setup_context)


def scaled(grad: torch.Tensor, by: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """grad * by in `dtype`, rounded once; nothing is touched where `by` is known to be 1."""
    eager = type(by) is torch.Tensor and not torch.compiler.is_compiling()
    if eager and by.device.type == "cpu" and by.item() == 1.0:
        return grad.to(dtype)
    by = by.to(grad.dtype)
    if eager and not torch.is_grad_enabled():  # one pass: multiplied wide, rounded on the way out
        return torch.mul(grad, by, out=grad.new_empty(grad.shape, dtype=dtype))
    return (grad * by).to(dtype)


def run(
    given: Projection,
    call: LossCall,
    need: list[bool],
    into: torch.Tensor | None = None,
    into_scale: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """The op itself; `into` receives into_scale * dweight instead of a new tensor."""
    head = Head(given.weight, given.bias, given.softcap, given.logit_scale, given.impl, given.group)
    hidden, t = given.hidden, call.tokens
    entropy = None if t.entropy is None else torch.zeros_like(t.logp)
    call = call._replace(tokens=t._replace(logp=torch.zeros_like(t.logp), entropy=entropy))
    loss = _Loss(call, "triton" if given.impl == "triton" and call.obj.loss.kernel else "reference")
    # dweight added to the caller's tensor cannot be taken back for a second pass.
    once = into is not None or looks_at_each_chunk(hidden.device)
    for safe in (True,) if once else (False, True):
        grads = Gradients(head, hidden, tuple(need), into, into_scale)
        clamped = _run_blocks(head, given, loss, grads, safe)
        if safe or not int(clamped):
            break
    value, stats = call.loss_and_stats(loss.impl)
    measured = hidden.new_empty(0, dtype=t.logp.dtype) if entropy is None else entropy
    return value, stats, call.tokens.logp, *grads.finish(), clamped, measured


def _run_blocks(
    head: Head, given: Projection, loss: "_Loss", grads: Gradients, safe: bool
) -> torch.Tensor:
    """Fill in the log-probs of `loss.tokens` and the gradients; returns the overflow count."""
    tokens, targets, inv_temperature = loss.tokens, given.targets, given.inv_temperature
    clamped = targets.new_zeros(())
    kept = tokens.mask.nonzero()[:, 0]
    index = None if len(kept) == len(targets) else kept
    step = head.chunk_rows(len(kept), given.workspace_mb)
    buffer = head.buffer(step)
    entropy = tokens.entropy is not None

    def chunk(rows: slice | torch.Tensor) -> tuple[Chunk, torch.Tensor, torch.Tensor, object]:
        x, y = head.rows(given.hidden, rows), targets[rows]
        inv_t = None if inv_temperature is None else inv_temperature[rows].to(head.acc_dtype)
        c = head.chunk(x, y, inv_t, buffer, entropy, safe)
        tokens.logp[rows] = c.logp
        if entropy:
            tokens.entropy[rows] = c.entropy
        return c, x, y, inv_t

    for block in loss.blocks(len(kept), index, step, any(grads.need)):
        parts = [block[i : i + step] for i in range(0, len(block), step)]
        rows_of = [_rows(part, index) for part in parts]
        for rows in rows_of:
            c, x, y, inv_t = chunk(rows)
            clamped += c.overflow.sum()
        if not any(grads.need):
            continue
        dlogp, dentropy = loss.gradient(_rows(block, index))
        for part, rows in zip(parts, rows_of, strict=True):
            if len(parts) > 1:
                c, x, y, inv_t = chunk(rows)
            at = slice(part.start - block.start, part.stop - block.start)
            h = None if dentropy is None else dentropy[at]
            E, v = head.weigh(c, y, inv_t, dlogp[at], h, in_place=True)
            grads.add(E, v, x, rows)
    return clamped


def _rows(part: range, index: torch.Tensor | None) -> slice | torch.Tensor:
    rows = slice(part.start, part.stop)
    return rows if index is None else index[rows]


class _Loss:
    """The loss of the call, and its gradient for rows that do not depend on the others."""

    def __init__(self, call: LossCall, impl: str) -> None:
        self.call, self.tokens, self.impl = call, call.tokens, impl
        self.coupled = call.obj.couples_tokens(call.tokens.rollout_logp is not None)
        self.global_statistic = call.obj.top_entropy_quantile < 1.0
        self.count = call.tokens.mask.sum()

    def blocks(
        self, count: int, index: torch.Tensor | None, step: int, gradients: bool
    ) -> Iterator[range]:
        """Ranges of the `count` kept rows, at `index`, whose gradient depends on no other row; at
        most `step` long if possible."""
        if not gradients or not (self.coupled or self.global_statistic):
            for start in range(0, count, step):
                yield range(start, min(start + step, count))
            return
        if self.global_statistic:
            if count:
                yield range(count)
            return
        ids = self.tokens.seq_ids if index is None else self.tokens.seq_ids[index]
        start = end = 0
        for length in torch.bincount(ids).tolist():
            if end > start and end + length - start > step:
                yield range(start, end)
                start = end
            end += length
        if end > start:
            yield range(start, end)

    def gradient(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(dloss/dlogp, dloss/dentropy or None) of the rows, from the log-probs made so far."""
        call = self.call
        t = Tokens(*(x[rows] if isinstance(x, torch.Tensor) else x for x in call.tokens))
        terms = tuple(
            dataclasses.replace(
                term,
                other_logp=term.other_logp[rows],
                mask=None if term.mask is None else term.mask[rows],
            )
            for term in call.kl_terms
        )
        share = t.mask.sum().to(t.logp.dtype) / self.count.clamp(min=1)
        scales = Scales(call.scales.token[rows], call.scales.entropy * share)
        if self.impl == "triton":
            slopes = importlib.import_module("fastgrpo_kernels.grpo_loss").grpo_slopes
            return slopes(t, call.obj, call.num_rows, scales, terms, call.sampled_entropy_coef)
        bonus = call.obj.entropy_coef != 0.0
        with autograd_allowed():
            leaves = [t.logp.detach().requires_grad_()]
            if bonus:
                leaves.append(t.entropy.detach().requires_grad_())
            t = t._replace(logp=leaves[0], entropy=leaves[1] if bonus else t.entropy)
            part = call._replace(tokens=t, scales=scales, kl_terms=terms)
            loss, _ = part.loss_and_stats(self.impl, ["policy_loss"])
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return grads[0], grads[1] if bonus else None


@contextmanager
def autograd_allowed() -> Iterator[None]:
    """Autograd inside a custom op, whose kernel runs below the autograd dispatch keys."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


_GIVEN = tuple(name for name in Tokens._fields if name not in ("logp", "entropy", "per_sequence"))
_KL_NUMBERS = ("coefficient", "estimator", "log_ratio_clamp", "value_clamp")


def pack(call: LossCall) -> tuple[list[torch.Tensor], str]:
    """The tensors of a call, and what is not a tensor as a string: custom ops take no objects."""
    t = call.tokens
    present = [name for name in _GIVEN if getattr(t, name) is not None]
    columns = [*call.scales, *(getattr(t, name) for name in present)]
    for term in call.kl_terms:
        columns += [term.other_logp] if term.mask is None else [term.other_logp, term.mask]
    kl = [
        [term.mask is not None, *(getattr(term, name) for name in _KL_NUMBERS)]
        for term in call.kl_terms
    ]
    rest = [present, kl, t.entropy is not None, t.per_sequence, call.sampled_entropy_coef]
    return columns, _dumps(call.obj, rest)


@constant_when_compiled
def _dumps(obj: Objective, rest: list) -> str:
    return json.dumps([dataclasses.asdict(obj), *rest])


def unpack(columns: list[torch.Tensor], spec: str, num_rows: int, hidden: torch.Tensor) -> LossCall:
    """The call that `pack` packed, of the rows of `hidden`."""
    obj, present, kl, entropy, per_sequence, sampled = _parse(spec)
    column = iter(columns)
    scales = Scales(next(column), next(column))
    given = {name: next(column) for name in present}
    terms = tuple(
        KLTerm(next(column), *numbers, mask=next(column) if masked else None)
        for masked, *numbers in kl
    )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    to_come = hidden.new_empty(hidden.shape[0], dtype=wide)
    last = {"entropy": to_come if entropy else None, "per_sequence": per_sequence}
    return LossCall(Tokens(to_come, **given, **last), obj, num_rows, scales, terms, sampled)


@functools.lru_cache(maxsize=64)
def _parse(spec: str) -> tuple:
    fields, *rest = json.loads(spec)
    return Objective(**fields), *rest
