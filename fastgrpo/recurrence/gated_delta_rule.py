# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule over a packed row, in chunks of C tokens: matrix products, no kernel.

A chunk that starts from state S, with d_i = sum_{j <= i} g_j inside it, in rows i >= j:

    A_ij = beta_i exp(d_i - d_j) k_i.k_j (i > j),   P_ij = exp(d_i - d_j) q_i.k_j
    [U | W] = (1 + A)^-1 [beta v | beta exp(d) k],  N = U - W S
    out = exp(d) q S + P N,   S' = exp(d_C) S + (exp(d_C - d) k)^T N

(Yang et al., arXiv 2412.06464, §3.3.) All but the two lines with S is done for all chunks of the
row at once; those go depth by depth, a completion's first chunk from its prompt's last state.

Letters: T packed tokens, n chunks of C tokens, H value heads, H_k heads of queries and keys, K and
V head sizes, P prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 32  # half the work inside chunks that 64 has, on a CPU; twice the states kept


class Level(NamedTuple):
    """The chunks [start, end), as deep as one another, and the chunks they go on from; n: none."""

    start: int
    end: int
    parents: Tensor


class Chunks:
    """The chunks of a row's segments (start, end, prefix_start, prefix_end), ordered by depth.

    tokens (n * C,): packed token of each place, a neighbour's in padding; places (T,): the place of
    each token; real (n, 1, C): False in padding; parents (n,); last (P,): each prompt's last chunk.
    """

    def __init__(self, segments: np.ndarray, device: torch.device, size: int = CHUNK):
        pieces: list[tuple[int, int, int, int]] = []  # depth, start, end, parent
        last: dict[int, int] = {}
        for start, end, prefix_start, prefix_end in segments.tolist():
            is_prompt = prefix_start == prefix_end
            parent = -1 if is_prompt else last[prefix_start]
            for at in range(start, end, size):
                depth = 0 if parent < 0 else pieces[parent][0] + 1
                pieces.append((depth, at, min(at + size, end), parent))
                parent = len(pieces) - 1
            if is_prompt:
                last[start] = parent
        depth, start, end, parent = np.array(pieces, dtype=np.int64).T
        order = np.argsort(depth, kind="stable")
        rank = np.r_[np.argsort(order), len(order)]  # a parent of -1 is the zeros behind all
        token = start[order, None] + np.arange(size)
        real = token < end[order, None]
        token = np.minimum(token, end[order, None] - 1)
        places = np.empty(int(real.sum()), dtype=np.int64)
        places[token[real]] = np.flatnonzero(real)

        def sent(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        self.size, self.count = size, len(order)
        self.tokens, self.places = sent(token.reshape(-1)), sent(places)
        self.real, self.parents = sent(real[:, None]), sent(rank[parent[order]])
        self.last = sent(rank[list(last.values())])
        bounds = np.r_[0, np.cumsum(np.bincount(depth))].tolist()
        self.levels = [
            Level(lo, hi, self.parents[lo:hi]) for lo, hi in zip(bounds, bounds[1:], strict=False)
        ]

    def split(self, x: Tensor) -> Tensor:
        """(T, H, ...) -> (n, H, C, ...)"""
        taken = x.index_select(0, self.tokens).unflatten(0, (self.count, self.size))
        return taken.transpose(1, 2).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """(n, H, C, ...) -> (T, H, ...)"""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Outputs (T, H, V) of a packed row and each prompt's last state (P, H, K, V).

    q, k (T, H_k, K), v (T, H, V), g <= 0 and beta (T, H) of one dtype, in which it computes, under
    autocast too. Differentiable once in all five, through outputs and states.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _GatedDeltaRule.apply(q, k, v, g, beta, chunks)


class _Within(NamedTuple):
    """Of each chunk (n, H, C, C), in rows i >= j: exp(d_i - d_j), and k_i.k_j and q_i.k_j with it.
    beta times the second is the system to solve, whose diagonal is not read."""

    decay: Tensor
    kk: Tensor
    qk: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, d: Tensor) -> _Within:
        later = torch.ones(d.shape[-1], d.shape[-1], dtype=torch.bool, device=d.device).triu_(1)
        decay = (d[..., :, None] - d[..., None, :]).masked_fill_(later, float("-inf")).exp_()
        return cls(decay, *(_of_heads(x @ k.mT, d) * decay for x in (k, q)))


class _Between(NamedTuple):
    """What joins a chunk to the states: exp(d) q (n, H, C, K) reads the one before, exp(d_C - d) k
    (n, H, C, K) writes the one after, exp(d_C) (n, H, 1, 1) of the former stays in the latter."""

    reads: Tensor
    keys: Tensor
    stays: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, d: Tensor) -> _Between:
        end = d[..., -1:]
        reads = _of_heads(q, d) * d.exp()[..., None]
        return cls(reads, _of_heads(k, d) * (end - d).exp()[..., None], end.exp()[..., None])


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, chunks: Chunks):
        q, k, v, g, beta = map(chunks.split, (q, k, v, g, beta))
        g, beta = g * chunks.real, beta * chunks.real  # padding forgets nothing, writes nothing
        d = g.cumsum(-1)
        within, between = _Within.of(q, k, d), _Between.of(q, k, d)
        written = torch.cat([v, _of_heads(k, d) * d.exp()[..., None]], -1) * beta[..., None]
        inverse = _inverse(within.kk * beta[..., None])
        solved = inverse @ written
        news, states = _scan(solved, between, chunks)
        out = between.reads @ states.index_select(0, chunks.parents) + within.qk @ news
        ctx.save_for_backward(q, k, v, d, beta, *within, inverse, solved, news, states)
        ctx.chunks = chunks
        return chunks.join(out), states.index_select(0, chunks.last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast):
        with torch.autocast(dout.device.type, enabled=False):
            return _backward(ctx, dout, dlast)


def _backward(ctx, dout: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, d, beta, *within, inverse, solved, news, states = ctx.saved_tensors
    chunks, within, between = ctx.chunks, _Within(*within), _Between.of(q, k, d)
    dout = chunks.split(dout) * chunks.real[..., None]
    before = states.index_select(0, chunks.parents)
    dnews, dstates = _scan_backward(dout, dlast, solved, within.qk, between, chunks)
    dbetween = _Between(
        dout @ before.mT, news @ dstates.mT, (before * dstates).sum((-1, -2), keepdim=True)
    )
    dwritten = inverse.mT @ torch.cat([dnews, -(dnews @ before.mT)], -1)
    dsystem = (dwritten @ solved.mT).neg_()
    dsystem.diagonal(dim1=-2, dim2=-1).zero_()

    from_values, from_keys = dwritten.split((v.shape[-1], k.shape[-1]), -1)
    from_keys = from_keys * d.exp()[..., None]
    through_keys = (from_keys * _of_heads(k, d)).sum(-1)
    through_system = dsystem * within.kk
    dbeta = (from_values * v).sum(-1) + through_keys + through_system.sum(-1)
    dq, dk, dd = _between_backward(dbetween, between, d)
    dk += from_keys * beta[..., None]
    dqk = dout @ news.mT
    through_pairs = through_system * beta[..., None] + dqk * within.qk
    dd += through_keys * beta + through_pairs.sum(-1) - through_pairs.sum(-2)
    dkk, dqk = (_to_groups(x * within.decay, k) for x in (dsystem * beta[..., None], dqk))
    dq = _to_groups(dq, k) + dqk @ k
    dk = _to_groups(dk, k) + (dkk + dkk.mT) @ k + dqk.mT @ q
    dg = dd.flip(-1).cumsum(-1).flip(-1)
    dv = from_values * beta[..., None]
    return *map(chunks.join, (dq, dk, dv, dg, dbeta)), None


def _scan(solved: Tensor, between: _Between, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """N (n, H, C, V); the state after each chunk, and last one of zeros (n + 1, H, K, V)."""
    heads, width = between.keys.shape[1], between.keys.shape[-1]
    own, read = solved.split((solved.shape[-1] - width, width), -1)
    news, states = (
        torch.empty_like(own),
        own.new_zeros(chunks.count + 1, heads, width, own.shape[-1]),
    )
    for start, end, parents in chunks.levels:
        here, state = slice(start, end), states.index_select(0, parents)
        news[here] = own[here] - read[here] @ state
        states[here] = between.stays[here] * state + between.keys[here].mT @ news[here]
    return news, states


def _scan_backward(
    dout: Tensor, dlast: Tensor, solved: Tensor, qk: Tensor, between: _Between, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Gradients of N (n, H, C, V), and of the state after each chunk (n, H, K, V)."""
    width = between.keys.shape[-1]
    read = solved[..., -width:]
    dnews, dbefore = qk.mT @ dout, between.reads.mT @ dout
    dstates = dlast.new_zeros(chunks.count + 1, *dlast.shape[1:])
    dstates.index_copy_(0, chunks.last, dlast)
    for start, end, parents in reversed(chunks.levels):
        here = slice(start, end)
        dnews[here] += between.keys[here] @ dstates[here]
        dbefore[here] += between.stays[here] * dstates[here] - read[here].mT @ dnews[here]
        dstates.index_add_(0, parents, dbefore[here])
    return dnews, dstates[:-1]


def _between_backward(
    dbetween: _Between, between: _Between, d: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k (n, H, C, K) as each value head has them, and of d."""
    left = (d[..., -1:] - d).exp()
    fades = (dbetween.keys * between.keys).sum(-1)
    dd = (dbetween.reads * between.reads).sum(-1) - fades
    dd[..., -1] += fades.sum(-1) + (dbetween.stays * between.stays)[..., 0, 0]
    return dbetween.reads * d.exp()[..., None], dbetween.keys * left[..., None], dd


def _inverse(system: Tensor) -> Tensor:
    """(1 + A)^-1 of the entries of `system` (n, H, C, C) below its diagonal."""
    one = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(
        system, one.expand_as(system), upper=False, unitriangular=True
    )


def _of_heads(x: Tensor, like: Tensor) -> Tensor:
    """(n, H_k, ...) -> (n, H, ...), each for the heads of `like` that share it."""
    share = like.shape[1] // x.shape[1]
    return x if share == 1 else x.repeat_interleave(share, 1)


def _to_groups(x: Tensor, like: Tensor) -> Tensor:
    """(n, H, ...) -> (n, H_k, ...), the sum over the heads that share one of `like`."""
    heads = like.shape[1]
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
