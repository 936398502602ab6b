# SPDX-License-Identifier: Apache-2.0
"""Chunks of a projection about the target logit: what the fused ops share.

Letters: C rows of a chunk, D hidden size, V vocabulary (of this rank's shard).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastgrpo.ops.linear.memory import chunk_rows
from fastgrpo.ops.linear.offset_exp import (
    MAX_EXPONENT,
    exp_limit,
    offset_exp,
    set_target_,
    transform_logits_,
)
from fastgrpo.ops.linear.shard import Shard

# Rows between which the softmax work of one chunk is cut so that it stays in the L2 cache.
_BLOCK = 1 << 18


@dataclass
class Chunk:
    """Exponentials of C rows and what their log-probs and gradients need, every tensor (C,).

    exps: (C, V) E about the offset c, with E_y = -S. shift: (c - f_y) / T, None where all are 0;
    above 0 for rows on the safe path, whose offset is their maximum. total: Z = S + exp(-shift).
    logp, entropy: of the targets; target_logit: f(z_y); overflow: rows that need the safe path.
    """

    exps: torch.Tensor
    total: torch.Tensor
    shift: torch.Tensor | None
    logp: torch.Tensor
    entropy: torch.Tensor | None
    target_logit: torch.Tensor
    overflow: torch.Tensor


class Head:
    """The projection z = hidden @ weight.T + bias, f(z) = softcap tanh(logit_scale z / softcap).

    weight is held in the dtype of the matmuls: float64, bfloat16 (on CUDA, with float32
    accumulation and results), else float32.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        logit_scale: float,
        impl: str,
        group_name: str = "",
    ) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        half = bfloat16_products(weight)
        self.acc_dtype = wide
        self.weight = weight.detach().to(weight.dtype if half else wide)
        self.half = half
        self.bias = None if bias is None else bias.detach().to(wide)
        self.softcap, self.logit_scale = softcap, logit_scale
        self.offset_exp, self.impl = offset_exp_as(impl), impl
        self.shard = Shard(group_name, weight.shape[0]) if group_name else None
        plain = half and impl == "triton" and bias is None and softcap is None and not group_name
        self.epilogue = plain and _epilogue().serves(self.weight)

    def buffer(self, rows: int) -> torch.Tensor:
        """Memory for the logits of a chunk."""
        return self.weight.new_empty(rows, self.weight.shape[0], dtype=self.acc_dtype)

    def rows(self, hidden: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """The rows of `hidden` at `index` (None: all) in the dtype of the matmuls."""
        x = hidden.detach() if index is None else hidden.detach()[index]
        return x.to(self.weight.dtype)

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        mm = mm_wide if self.half else torch.mm
        return mm(x, self.weight.t(), out=out)

    def chunk_rows(self, rows: int, workspace_mb: float | None) -> int:
        """Rows of a chunk of this head."""
        V, device = len(self.weight), self.weight.device
        return chunk_rows(V, rows, self.acc_dtype.itemsize, workspace_mb, device)

    def chunk(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        inv_t: torch.Tensor | None,
        buffer: torch.Tensor,
        entropy: bool,
        safe: bool = True,
        keep: torch.Tensor | None = None,
    ) -> Chunk:
        """Exponentials of the rows x (C, D) with targets y, made in `buffer` and left in `keep`
        (C, V) if that is given, in its dtype.

        safe: rows whose exponents overflow are recomputed about their maximum; see `until_safe`.
        """
        if self.epilogue and not entropy:
            return self._chunk_by_epilogue(x, y, inv_t, buffer, safe, keep)
        z = self.logits(x, buffer[: len(x)])
        if self.shard is not None:
            y = self.shard.local(y)
        given = None if self.shard is None else self._target_logit(z, y)
        straight = keep is not None and self.impl == "triton"
        out = self.offset_exp(
            z,
            y,
            inv_temperature=inv_t,
            bias=self.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            entropy=entropy,
            exp_dtype=torch.bfloat16 if self.half else None,
            target_logit=given,
            **({"out": keep} if straight else {}),
        )
        exps = out.exps if keep is None or straight else keep.copy_(out.exps)
        S, moment, overflow = out.sum_exp, out.moment, out.overflow
        if self.shard is None:
            y = y.clamp(0, z.shape[1] - 1)  # the row of a wrong target is NaN already
        else:
            S, moment, overflow = (
                self.shard.sum(S),
                self.shard.sum(moment),
                self.shard.any(overflow),
            )
            overflow |= ~(S < exp_limit(S.dtype))
            set_target_(exps, y[:, None], -S[:, None], sharded=True)
        c = Chunk(exps, 1.0 + S, None, -torch.log1p(S), None, out.target_logit, overflow)
        if entropy:
            c.entropy = torch.log1p(S) - moment / c.total
        if safe and bool(overflow.any()):
            self._safe_rows(x, y, inv_t, c)
        return c

    def _chunk_by_epilogue(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        inv_t: torch.Tensor | None,
        buffer: torch.Tensor,
        safe: bool,
        keep: torch.Tensor | None,
    ) -> Chunk:
        """`chunk` by the matmul that ends in the exponential; the offset is a dot product of its
        own, about which the matmul's target logit is shifted by its rounding."""
        V = len(self.weight)
        exps = buffer.view(torch.bfloat16)[: len(x), :V] if keep is None else keep
        wrong = (y < 0) | (y >= V)
        y = y.clamp(0, V - 1)
        scale = x.new_ones(len(x), dtype=self.acc_dtype) if inv_t is None else inv_t
        scale = scale * self.logit_scale
        S, c, zy = _epilogue().linear_exp(x, self.weight, y, scale, exps)
        shift = (c - zy) * scale
        shift = torch.where(wrong, torch.nan, shift)
        overflow = ~((S < exp_limit(S.dtype)) & shift.isfinite())
        logp = -shift - torch.log1p(S + torch.expm1(-shift))
        out = Chunk(exps, S + torch.exp(-shift), shift, logp, None, zy * self.logit_scale, overflow)
        if safe and bool(overflow.any()):
            self._safe_rows(x, y, inv_t, out)
        return out

    def until_safe(self, fill: Callable[[bool], torch.Tensor]) -> torch.Tensor:
        """Run the chunks of a call, `fill(safe)`, and again if rows of an unsafe pass overflowed;
        returns the overflow count of the pass that stands."""
        if looks_at_each_chunk(self.weight.device):
            return fill(True)
        clamped = fill(False)
        return fill(True) if int(clamped) else clamped

    def _target_logit(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """f(z_y) over all shards: one all-reduce of a float per row."""
        here = (y >= 0) & (y < z.shape[1])
        column = y.clamp(0, max(z.shape[1] - 1, 0))
        zy = z.gather(1, column[:, None])[:, 0]
        bias = None if self.bias is None else self.bias[column]
        zy = transform_logits_(zy.clone(), bias, self.logit_scale, self.softcap)
        return self.shard.sum(torch.where(here, zy, torch.zeros_like(zy)))

    def _safe_rows(
        self, x: torch.Tensor, y: torch.Tensor, inv_t: torch.Tensor | None, c: Chunk
    ) -> None:
        """Redo the overflowing rows of a chunk about their maximum, in place."""
        rows = c.overflow.nonzero()[:, 0]
        z = self.logits(x[rows], self.buffer(len(rows)))
        transform_logits_(z, self.bias, self.logit_scale, self.softcap)
        zy, y = c.target_logit[rows], y[rows, None]
        scale = torch.ones_like(zy) if inv_t is None else inv_t[rows]
        reduce = (lambda t: t) if self.shard is None else self.shard.sum
        m = z.amax(1) if self.shard is None else self.shard.max(z.amax(1))
        centre = torch.where((m - zy) * scale <= MAX_EXPONENT, zy, m)
        shift = (centre - zy) * scale
        own = torch.exp(-shift)
        E = z.sub_(centre[:, None]).mul_(scale[:, None]).exp_()
        set_target_(E, y, 0.0, self.shard is not None)
        S = reduce(E.sum(1))
        total = S + own
        if c.entropy is not None:
            moment = -reduce(torch.special.entr(E).sum(1)) - torch.special.entr(own)
            c.entropy[rows] = total.log() - moment / total
        set_target_(E, y, -S[:, None], self.shard is not None)
        c.exps[rows] = E.to(c.exps.dtype)
        c.shift = torch.zeros_like(c.total) if c.shift is None else c.shift
        c.shift[rows], c.total[rows] = shift, total
        c.logp[rows] = -shift - torch.log1p(S + torch.expm1(-shift))

    def weigh(
        self,
        c: Chunk,
        y: torch.Tensor,
        inv_t: torch.Tensor | None,
        dlogp: torch.Tensor,
        dentropy: torch.Tensor | None,
        in_place: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(E', v): the gradient of the logits before f and scale is -v_i E'_ij / logit_scale.

        Without entropy gradient and softcap E' is E itself and dlogits is never formed:
        v = dlogp / (T Z). Else E' carries the factors that differ along a row.
        """
        v = self.logit_scale / c.total
        if inv_t is not None:
            v = v * inv_t
        if dentropy is None and self.softcap is None:
            return c.exps, v * -dlogp
        last = c.exps.shape[1] - 1
        y = y.clamp(0, last) if self.shard is None else self.shard.local(y)
        E = c.exps if in_place else c.exps.clone()
        if self.impl == "triton":
            self._weigh_by_kernel(E, c, y, inv_t, dlogp, dentropy)
            return E, -v
        step = max(1, _BLOCK // max(E.shape[1], 1)) if E.device.type == "cpu" else len(E)
        for start in range(0, len(E), max(step, 1)):
            rows = slice(start, start + step)
            self._weigh_rows(E[rows], _rows_of(c, rows), y[rows], inv_t, rows, dlogp, dentropy)
        return E, -v

    def _weigh_rows(self, E, c, y, inv_t, rows, dlogp, dentropy) -> None:
        """E_j *= (g + h (log p_j + H)) f'_j for j != y; E_y by its own closed form."""
        g = dlogp[rows]
        shift = torch.zeros_like(c.total) if c.shift is None else c.shift
        own = torch.exp(-shift)
        # ln 0 = -inf would make 0 * inf below; such an entry has p = 0 and stays 0.
        ln_E = E.to(c.total.dtype).log().clamp_(min=-1e4)
        at_target = -g * (c.total - own)  # E_y = -S
        factor = g[:, None]
        if dentropy is not None:
            h = dentropy[rows]
            factor = (ln_E + (c.entropy - c.total.log())[:, None]).mul_(h[:, None]).add_(factor)
            inner = torch.where(own > 0, c.logp + c.entropy, torch.zeros_like(own))
            at_target = at_target + h * own * inner
        if self.softcap is not None:
            T = torch.ones_like(own) if inv_t is None else 1.0 / inv_t[rows]
            centre = c.target_logit + T * shift  # f_j = centre + T ln E_j
            f = ln_E.mul_(T[:, None]).add_(centre[:, None]).div_(self.softcap).clamp_(-1.0, 1.0)
            factor = factor * (1.0 - f * f)
            at_target = at_target * (1.0 - (c.target_logit / self.softcap) ** 2)
        E.mul_(factor)
        set_target_(E, y[:, None], at_target[:, None], self.shard is not None)

    def _weigh_by_kernel(self, E, c, y, inv_t, dlogp, dentropy) -> None:
        """`_weigh_rows` of all rows in one kernel: the numbers of a row here, the rest there."""
        shift = torch.zeros_like(c.total) if c.shift is None else c.shift
        own = torch.exp(-shift)
        at_target = -dlogp * (c.total - own)
        constant = T = middle = None
        if dentropy is not None:
            constant = c.entropy - c.total.log()
            inner = torch.where(own > 0, c.logp + c.entropy, torch.zeros_like(own))
            at_target = at_target + dentropy * own * inner
        if self.softcap is not None:
            T = torch.ones_like(own) if inv_t is None else 1.0 / inv_t
            middle = c.target_logit + T * shift
            at_target = at_target * (1.0 - (c.target_logit / self.softcap) ** 2)
        weigh = importlib.import_module("fastgrpo_kernels.weigh_exps").weigh_exps_
        weigh(E, y, dlogp, dentropy, constant, T, middle, at_target, self.softcap or 1.0)


def _rows_of(c: Chunk, rows: slice) -> Chunk:
    cut = {name: None if x is None else x[rows] for name, x in vars(c).items()}
    return Chunk(**cut)


class Gradients:
    """dhidden, dweight and dbias of a head, summed over chunks without forming dlogits."""

    def __init__(
        self,
        head: Head,
        hidden: torch.Tensor,
        need: tuple[bool, ...],
        into: torch.Tensor | None = None,
        into_scale: float = 1.0,
        at_once: bool = False,
    ) -> None:
        """at_once: one chunk holds all rows, so dweight is rounded to the weight's dtype by the
        matmul that makes it."""
        self.head, self.at_once = head, at_once
        V, D = head.weight.shape
        new = head.weight.new_empty
        self.dhidden = hidden.new_zeros(hidden.shape if need[0] else 0, dtype=head.acc_dtype)
        dtype = head.weight.dtype if at_once else head.acc_dtype
        self.dweight = new((V, D) if need[1] else 0, dtype=dtype)
        self.dbias = new(V, dtype=head.acc_dtype).zero_() if need[2] else new(0)
        self.need, self.first, self.dweight_scale = need, True, into_scale
        if into is not None:
            self.dweight, self.first = into, False

    def add(
        self, E: torch.Tensor, v: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | slice
    ) -> None:
        """Add a chunk: E (C, V), row scales v (C,), inputs x (C, D), their rows of hidden."""
        head = self.head
        if self.need[0]:
            self._add_dhidden(E, v, rows)
        if self.need[1]:
            u = v if self.dweight_scale == 1.0 else v * self.dweight_scale
            scaled = (x * u[:, None]).to(x.dtype)
            if self.at_once:
                torch.mm(E.t(), scaled, out=self.dweight)
            elif self.first:
                (mm_wide if head.half else torch.mm)(E.t(), scaled, out=self.dweight)
            elif head.half:
                mm_wide(E.t(), scaled, out=self.dweight, add=True)
            else:
                self.dweight.addmm_(E.t(), scaled)
            self.first = False
        if self.need[2]:
            self.dbias.addmv_(E.t().to(self.dbias.dtype), v)

    def _add_dhidden(self, E: torch.Tensor, v: torch.Tensor, rows: torch.Tensor | slice) -> None:
        weight = self.head.weight
        if isinstance(rows, slice) and not self.head.half:
            torch.mm(E, weight, out=self.dhidden[rows]).mul_(v[:, None])
            return
        dx = mm_wide(E, weight) if self.head.half else torch.mm(E, weight)
        self.dhidden[rows] = dx.mul_(v[:, None])

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dhidden, dweight, dbias) as accumulated; empty tensors for what was not asked for."""
        if self.need[1] and self.first:
            self.dweight.zero_()
        if self.head.shard is not None and self.need[0]:
            self.head.shard.sum(self.dhidden)
        return self.dhidden, self.dweight, self.dbias


def looks_at_each_chunk(device: torch.device) -> bool:
    """Whether overflow is looked at chunk by chunk. On a GPU each look is a host synchronisation: a
    call looks once at its end and does its work again in the rare case."""
    return device.type == "cpu"


def bfloat16_products(x: torch.Tensor) -> bool:
    """Whether the matmuls take bfloat16 inputs: on CUDA, where they give float32 results."""
    return x.dtype == torch.bfloat16 and x.device.type == "cuda"


def mm_wide(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None, add: bool = False
) -> torch.Tensor:
    """a @ b of bfloat16 inputs in float32, into or onto `out`, never rounded in between."""
    if add:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _epilogue():
    return importlib.import_module("fastgrpo_kernels.linear_exp")


def offset_exp_as(impl: str) -> Callable:
    """The streaming pass of an implementation."""
    if impl == "triton":
        return importlib.import_module("fastgrpo_kernels.offset_exp").offset_exp
    if impl == "cpp":
        return importlib.import_module("fastgrpo_kernels._cpp").offset_exp
    return offset_exp
