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
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgrpo.losses.metrics import metric_names
from fastgrpo.losses.tokens import Scales, Tokens, token_scales
from fastgrpo.objective import KLTerm, Objective
from fastgrpo.ops.grpo_loss import terms_and_stats
from fastgrpo.ops.linear.head import Chunk, Gradients, Head
from fastgrpo.ops.select import constant_when_compiled


@torch.library.custom_op("fastgrpo::linear_grpo_loss", mutates_args=())
def linear_grpo_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    advantages: torch.Tensor,
    seq_ids: torch.Tensor,
    mask: torch.Tensor,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    kl_logps: list[torch.Tensor],
    kl_masks: list[torch.Tensor],
    num_tokens: torch.Tensor | None,
    num_sequences: torch.Tensor | None,
    num_rows: int,
    per_sequence: bool,
    spec: str,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    need: list[bool],
    impl: str,
    workspace_mb: float | None,
    group: str,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """(loss, stats, logp, dhidden, dweight, dbias, overflow count)."""
    args = locals()
    return run(**args)


def run(
    hidden, weight, bias, targets, inv_temperature, advantages, seq_ids, mask, old_logp, ref_logp,
    rollout_logp, token_weights, kl_logps, kl_masks, num_tokens, num_sequences, num_rows,
    per_sequence, spec, softcap, logit_scale, entropy, need, impl, workspace_mb, group,
    into=None, into_scale=1.0,
):  # fmt: skip
    """The op itself; `into` receives into_scale * dweight instead of a new tensor."""
    obj, streams, sampled = decode_spec(spec, tuple(kl_logps), tuple(kl_masks))
    head = Head(weight, bias, softcap, logit_scale, impl, group)
    wide = head.acc_dtype
    tokens = Tokens(
        hidden.new_zeros(len(targets), dtype=wide),
        advantages,
        seq_ids,
        mask,
        old_logp,
        ref_logp,
        rollout_logp,
        hidden.new_zeros(len(targets), dtype=wide) if entropy else None,
        token_weights,
        per_sequence,
    )
    scales = token_scales(obj, seq_ids, mask, num_rows, num_tokens, num_sequences, wide)
    evaluate = terms_and_stats("triton" if impl == "triton" else "reference")
    loss = _Loss(obj, tokens, scales, num_rows, streams, sampled, evaluate)
    # Looking for overflow costs a host synchronisation per chunk: on a GPU only on a second try.
    for safe in (True,) if into is not None or not hidden.is_cuda else (False, True):
        grads = Gradients(head, hidden, tuple(need), into, into_scale)
        clamped = _run_blocks(
            head, hidden, targets, inv_temperature, loss, grads, workspace_mb, safe
        )
        if safe or not int(clamped):
            break
    names = metric_names(
        obj, ref_logp is not None, rollout_logp is not None, entropy, len(kl_logps)
    )
    value, stats = evaluate(tokens, obj, num_rows, scales, streams, sampled, names)
    return value, stats, tokens.logp, *grads.finish(), clamped


@linear_grpo_op.register_fake
def _(hidden, weight, bias, targets, inv_temperature, advantages, seq_ids, mask, old_logp,
      ref_logp, rollout_logp, token_weights, kl_logps, kl_masks, num_tokens, num_sequences,
      num_rows, per_sequence, spec, softcap, logit_scale, entropy, need, *_):  # fmt: skip
    obj, _, _ = decode_spec(spec, tuple(kl_logps), tuple(kl_masks))
    names = metric_names(
        obj, ref_logp is not None, rollout_logp is not None, entropy, len(kl_logps)
    )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(names), 2, dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if need[0] else 0, dtype=wide),
        weight.new_empty(weight.shape if need[1] else 0, dtype=wide),
        hidden.new_empty(weight.shape[0] if need[2] else 0, dtype=wide),
        hidden.new_empty((), dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output) -> None:
    _, stats, logp, dhidden, dweight, dbias, clamped = output
    ctx.save_for_backward(dhidden, dweight, dbias)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.num_kl_terms = len(inputs[12])
    ctx.mark_non_differentiable(stats, logp, dhidden, dweight, dbias, clamped)
    # Without this, backward is handed a (V, D) tensor of zeros for the dweight among the outputs.
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 12 + ([None] * ctx.num_kl_terms,) * 2 + (None,) * 12
    grads = [
        scaled(grad, dloss, dtype) if needed else None
        for grad, dtype, needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True
        )
    ]
    lists = [None] * ctx.num_kl_terms
    return (*grads, *[None] * 9, lists, lists, *[None] * 12)


linear_grpo_op.register_autograd(_backward, setup_context=_setup_context)


def scaled(grad: torch.Tensor, by: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """grad * by in `dtype`, rounded once; nothing is touched where `by` is known to be 1."""
    eager = type(by) is torch.Tensor and not torch.compiler.is_compiling()
    if eager and by.device.type == "cpu" and by.item() == 1.0:
        return grad.to(dtype)
    return (grad * by.to(grad.dtype)).to(dtype)


def _run_blocks(
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    inv_temperature: torch.Tensor | None,
    loss: "_Loss",
    grads: Gradients,
    workspace_mb: float | None,
    safe: bool,
) -> torch.Tensor:
    """Fill in the log-probs of `loss.tokens` and the gradients; returns the overflow count."""
    tokens = loss.tokens
    clamped = hidden.new_zeros((), dtype=torch.int64)
    kept = tokens.mask.nonzero()[:, 0]
    index = None if len(kept) == len(targets) else kept
    step = head.chunk_rows(len(kept), workspace_mb)
    buffer = head.buffer(step)
    entropy = tokens.entropy is not None

    def chunk(rows: slice | torch.Tensor) -> tuple[Chunk, torch.Tensor, torch.Tensor, object]:
        x, y = head.rows(hidden, rows), targets[rows]
        inv_t = None if inv_temperature is None else inv_temperature[rows].to(head.acc_dtype)
        c = head.chunk(x, y, inv_t, buffer, entropy, safe)
        tokens.logp[rows] = c.logp
        if entropy:
            tokens.entropy[rows] = c.entropy
        return c, x, y, inv_t

    for block in _blocks(loss, kept, index, step, any(grads.need)):
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


def _blocks(
    loss: "_Loss", kept: torch.Tensor, index: torch.Tensor | None, step: int, gradients: bool
) -> Iterator[range]:
    """Ranges of kept rows whose gradient depends on no other row; at most `step` if possible."""
    count = len(kept)
    if not gradients or not (loss.coupled or loss.global_statistic):
        for start in range(0, count, step):
            yield range(start, min(start + step, count))
        return
    if loss.global_statistic:
        if count:
            yield range(count)
        return
    ids = loss.tokens.seq_ids if index is None else loss.tokens.seq_ids[index]
    start = end = 0
    for length in torch.bincount(ids).tolist():
        if end > start and end + length - start > step:
            yield range(start, end)
            start = end
        end += length
    if end > start:
        yield range(start, end)


class _Loss:
    """The loss of the call, and its gradient for rows that do not depend on the others."""

    def __init__(self, obj, tokens, scales, num_rows, streams, sampled, evaluate) -> None:
        self.obj, self.tokens, self.scales, self.evaluate = obj, tokens, scales, evaluate
        self.num_rows, self.streams, self.sampled = num_rows, streams, sampled
        self.coupled = obj.couples_tokens(tokens.rollout_logp is not None)
        self.global_statistic = obj.top_entropy_quantile < 1.0
        self.count = tokens.mask.sum()

    def gradient(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(dloss/dlogp, dloss/dentropy or None) of the rows, from the log-probs made so far."""
        t = Tokens(*(x[rows] if isinstance(x, torch.Tensor) else x for x in self.tokens))
        streams = [
            dataclasses.replace(
                s, other_logp=s.other_logp[rows], mask=None if s.mask is None else s.mask[rows]
            )
            for s in self.streams
        ]
        share = t.mask.sum().to(t.logp.dtype) / self.count.clamp(min=1)
        scales = Scales(self.scales.token[rows], self.scales.entropy * share)
        bonus = self.obj.entropy_coef != 0.0
        with autograd_allowed():
            leaves = [t.logp.detach().requires_grad_()]
            if bonus:
                leaves.append(t.entropy.detach().requires_grad_())
            t = t._replace(logp=leaves[0], entropy=leaves[1] if bonus else t.entropy)
            rest = (self.num_rows, scales, streams, self.sampled, ["policy_loss"])
            loss, _ = self.evaluate(t, self.obj, *rest)
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


def encode_spec(obj: Objective, kl_terms, sampled_entropy_coef: float) -> str:
    """What is not a tensor in a call, as a string: custom ops take no other objects."""
    names = ("coefficient", "estimator", "log_ratio_clamp", "value_clamp")
    scalars = [[getattr(term, name) for name in names] for term in kl_terms]
    return _dumps(obj, scalars, sampled_entropy_coef)


@constant_when_compiled
def _dumps(obj: Objective, kl_scalars: list[list], sampled_entropy_coef: float) -> str:
    fields = {"objective": dataclasses.asdict(obj), "kl_terms": kl_scalars}
    return json.dumps(fields | {"sampled_entropy_coef": sampled_entropy_coef})


def decode_spec(
    spec: str, kl_logps: tuple[torch.Tensor, ...], kl_masks: tuple[torch.Tensor, ...]
) -> tuple[Objective, list[KLTerm], float]:
    """(objective, KL streams, sampled_entropy_coef); an empty mask tensor stands for no mask."""
    obj, scalars, sampled = _parse(spec)
    streams = [
        KLTerm(logp, *numbers, None if mask.numel() == 0 else mask)
        for logp, mask, numbers in zip(kl_logps, kl_masks, scalars, strict=True)
    ]
    return obj, streams, sampled


@functools.lru_cache(maxsize=64)
def _parse(spec: str) -> tuple[Objective, list, float]:
    fields = json.loads(spec)
    obj = Objective(**fields["objective"])
    return obj, fields["kl_terms"], fields["sampled_entropy_coef"]
