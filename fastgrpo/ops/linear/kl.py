# SPDX-License-Identifier: Apache-2.0
"""linear_kl: full-vocabulary KL between two hidden-state streams, the logits never stored.

Letters: N rows, D hidden size, V vocabulary, C rows of a chunk.
"""

import importlib
from collections.abc import Iterator

import torch

from fastgrpo.checks import check_positive, check_tensor
from fastgrpo.errors import InputError
from fastgrpo.ops.linear.inputs import select_head, whole_weight
from fastgrpo.ops.linear.memory import chunk_rows, keeps
from fastgrpo.reference import linear_kl as reference

# Elements of a block whose dozen temporaries stay in the L2 cache.
_BLOCK = 1 << 15


def linear_kl(
    hidden_p: torch.Tensor,
    weight_p: torch.Tensor,
    hidden_q: torch.Tensor,
    weight_q: torch.Tensor,
    *,
    temperature: float = 1.0,
    impl: str | None = None,
    workspace_mb: float | None = None,
) -> torch.Tensor:
    """KL(p || q) over the whole vocabulary, row by row.

        p = softmax(hidden_p @ weight_p.T / T),  q = softmax(hidden_q @ weight_q.T / T)
        KL_n = sum_j p_nj (log p_nj - log q_nj) >= 0

    Args:
        hidden_p: (N, D), weight_p: (V, D); hidden_q: (N, E), weight_q: (V, E); one dtype.
        temperature: T > 0. workspace_mb: memory for the two chunks of logits (default 128, at
            least 512 rows; on a GPU 4096 rows, fewer where memory is short), and for keeping their
            (N, V) gradients (default 512, on a GPU a sixteenth of its memory if that is free).
        impl: "reference", "torch", "cpp" or "triton".

    Returns (N,) float32 (float64 from float64 inputs), differentiable in all four inputs: two
    matmuls, and one for each gradient wanted. Where the gradients of the logits do not fit the
    workspace, backward makes the logits again: two matmuls more. Plain PyTorch holds ten (N, V)
    tensors and needs no such matmuls: where there is memory, raise workspace_mb, and this op is
    the faster one. A token impossible under q but not under p makes its row +inf; a row with NaN
    or inf is NaN and touches no other.
    """
    weight_p, weight_q = whole_weight(weight_p), whole_weight(weight_q)
    sizes: dict[str, int] = {}
    check_tensor("hidden_p", hidden_p, "N D", like=sizes, floating=True)
    same = {"like": sizes, "dtypes": (hidden_p.dtype,), "device": hidden_p.device}
    check_tensor("weight_p", weight_p, "V D", **same)
    check_tensor("hidden_q", hidden_q, "N E", **same)
    check_tensor("weight_q", weight_q, "V E", **same)
    check_positive("temperature", temperature)
    if sizes["V"] == 0:
        raise InputError("weight_p: expected at least one vocabulary row, got (0, D)")
    chosen = select_head("linear_kl", hidden_p, impl)
    if chosen == "reference":
        return reference.linear_kl(hidden_p, weight_p, hidden_q, weight_q, temperature)
    inputs = (hidden_p, weight_p, hidden_q, weight_q)
    keep = _streams_to_keep(inputs, workspace_mb, chosen)
    return _linear_kl(*inputs, float(temperature), workspace_mb, chosen, keep)[0]


def _streams_to_keep(
    inputs: tuple[torch.Tensor, ...], workspace_mb: float | None, impl: str
) -> list[bool]:
    """Whether the gradient of p's and of q's logits is kept for backward."""
    hidden, weight = inputs[:2]
    wanted = [any(x.requires_grad for x in inputs[i : i + 2]) for i in (0, 2)]
    itemsize = 2 if _half(hidden, impl) else max(4, hidden.dtype.itemsize)
    sizes = (sum(wanted) * hidden.shape[0], weight.shape[0], itemsize)
    fit = torch.is_grad_enabled() and keeps(*sizes, workspace_mb, hidden.device)
    return [fit and w for w in wanted]


def _half(hidden: torch.Tensor, impl: str) -> bool:
    """bfloat16 matmuls accumulate and return float32; they need the kernels' bfloat16 gradients."""
    return hidden.dtype == torch.bfloat16 and hidden.device.type == "cuda" and impl == "triton"


@torch.library.custom_op("fastgrpo::linear_kl", mutates_args=())
def _linear_kl(
    hidden_p: torch.Tensor,
    weight_p: torch.Tensor,
    hidden_q: torch.Tensor,
    weight_q: torch.Tensor,
    temperature: float,
    workspace_mb: float | None,
    impl: str,
    keep: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL, its gradients by the logits of p and q: (N, V), or (0, V) where not kept)."""
    pair = _Pair(hidden_p, weight_p, hidden_q, weight_q, temperature, workspace_mb, impl)
    kl, *kept = _outputs(hidden_p, weight_p, impl, keep)
    if not pair.half:  # made where they are kept
        pair.kept = [dz if k else None for k, dz in zip(keep, kept, strict=True)]
    for rows, z_p, z_q in pair:
        kl[rows], z_p, z_q = pair.evaluate(z_p, z_q, any(keep))
        for k, dz, z in zip(keep, kept, (z_p, z_q), strict=True):
            if k and pair.half:
                dz[rows] = z
    return kl, *kept


@_linear_kl.register_fake
def _(hidden_p, weight_p, hidden_q, weight_q, temperature, workspace_mb, impl, keep):
    return _outputs(hidden_p, weight_p, impl, keep)


def _outputs(hidden, weight, impl, keep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, V, wide = hidden.shape[0], weight.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    dtype = torch.bfloat16 if _half(hidden, impl) else wide
    kept = (hidden.new_empty(N if k else 0, V, dtype=dtype) for k in keep)
    return hidden.new_empty(N, dtype=wide), *kept


@torch.library.custom_op("fastgrpo::linear_kl_backward", mutates_args=())
def _linear_kl_backward(
    dkl: torch.Tensor,
    hidden_p: torch.Tensor,
    weight_p: torch.Tensor,
    hidden_q: torch.Tensor,
    weight_q: torch.Tensor,
    kl: torch.Tensor,
    dz_p: torch.Tensor,
    dz_q: torch.Tensor,
    temperature: float,
    workspace_mb: float | None,
    impl: str,
    keep: list[bool],
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = (hidden_p, weight_p, hidden_q, weight_q)
    pair = _Pair(*inputs, temperature, workspace_mb, impl)
    grads = [
        x.new_empty(x.shape if n else 0, dtype=pair.dtype)
        for x, n in zip(inputs, need, strict=True)
    ]
    whole = slice(0, len(hidden_p))
    kept = all(k or not any(need[i : i + 2]) for k, i in zip(keep, (0, 2), strict=True))
    chunks = [(whole, dz_p, dz_q)] if kept else pair.gradients(kl)
    for rows, *dz_pq in chunks:
        g = (dkl[rows] / temperature)[:, None]
        for i, dz, w in ((0, dz_pq[0], pair.weight_p), (2, dz_pq[1], pair.weight_q)):
            if need[i]:
                pair.mm(dz, w, grads[i][rows], beta=0.0)
                grads[i][rows].mul_(g)
            if need[i + 1]:
                first = rows.start == 0
                pair.mm(dz.t(), (inputs[i][rows] * g).to(w.dtype), grads[i + 1], beta=1.0 - first)
    return tuple(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


@_linear_kl_backward.register_fake
def _(dkl, hidden_p, weight_p, hidden_q, weight_q, *args):
    need = args[-1]
    inputs = (hidden_p, weight_p, hidden_q, weight_q)
    return tuple(x.new_empty(x.shape if n else 0) for x, n in zip(inputs, need, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dkl, *_):
    if dkl is None:
        return (None,) * 8
    need = list(ctx.needs_input_grad[:4])
    grads = _linear_kl_backward(dkl.contiguous(), *ctx.saved_tensors, *ctx.options, need)
    grads = (g if n else None for g, n in zip(grads, need, strict=True))
    return *grads, None, None, None, None


_linear_kl.register_autograd(_backward, setup_context=_setup_context)


def kl_of_logits(z_p: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """(N,) sum_j p_j (e^x_j - 1 - x_j), x = log q - log p: sum_j q_j - p_j = 0 added, so that no
    term is negative and nothing cancels when p is close to q."""
    return _kl(z_p.log_softmax(1), z_q.log_softmax(1))[0]


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(KL (N,), p, q, x)"""
    possible = log_p != -torch.inf
    x = torch.where(possible, log_q - log_p, 0.0)
    p, q = log_p.exp(), log_q.exp()
    near = x.abs() < 1.0
    x_near = torch.where(near, x, 0.0)
    close = p * (torch.expm1(x_near) - x_near)
    far = q - p - p * torch.where(near, 0.0, x)
    return torch.where(near & possible, close, far).sum(1), p, q, x


def _kl_and_gradients_(z_p: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """The KL; in place z_p <- p (log p - log q - KL), z_q <- q - p."""
    kl, p, q, x = _kl(z_p.log_softmax(1), z_q.log_softmax(1))
    torch.mul(p, x.add_(kl[:, None]).neg_(), out=z_p)
    torch.sub(q, p, out=z_q)
    return kl


class _Pair:
    """Chunks of both streams' logits: yields (rows, z_p, z_q), buffers used again."""

    def __init__(
        self, hidden_p, weight_p, hidden_q, weight_q, temperature, workspace_mb, impl
    ) -> None:
        self.dtype = torch.promote_types(hidden_p.dtype, torch.float32)
        cuda = hidden_p.device.type == "cuda"
        self.half, self.impl = _half(hidden_p, impl), impl
        self.hidden_p, self.hidden_q, self.temperature = hidden_p, hidden_q, temperature
        dtype = torch.bfloat16 if self.half else self.dtype
        self.weight_p, self.weight_q = weight_p.to(dtype), weight_q.to(dtype)
        N, V = len(hidden_p), len(weight_p)
        self.step = chunk_rows(2 * V, N, self.dtype.itemsize, workspace_mb, hidden_p.device)
        self.kept: list[torch.Tensor | None] = [None, None]
        self.block = max(1, _BLOCK // V) if not cuda else self.step

    def __iter__(self):
        shape = self.step, len(self.weight_p)
        buffers = [
            self.hidden_p.new_empty(shape, dtype=self.dtype) if x is None else x for x in self.kept
        ]
        for start in range(0, len(self.hidden_p), self.step):
            rows = slice(start, min(start + self.step, len(self.hidden_p)))
            here = slice(0, rows.stop - start)
            z_p, z_q = (
                b[here if x is None else rows] for b, x in zip(buffers, self.kept, strict=True)
            )
            yield (
                rows,
                self._logits(self.hidden_p[rows], self.weight_p, z_p),
                self._logits(self.hidden_q[rows], self.weight_q, z_q),
            )

    def gradients(self, kl: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """The same with the KL's gradients by the logits in their place."""
        for rows, z_p, z_q in self:
            yield rows, *self.evaluate(z_p, z_q, True, kl[rows])[1:]

    def evaluate(
        self, z_p: torch.Tensor, z_q: torch.Tensor, gradients: bool, kl: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(KL, z_p, z_q) with the gradients in the place of the logits if wanted; `kl` if known."""
        if self.impl == "cpp":
            cpp = importlib.import_module("fastgrpo_kernels._cpp")
            return cpp.kl_of_logits(z_p, z_q, gradients), z_p, z_q
        if self.impl == "triton":
            kernels = importlib.import_module("fastgrpo_kernels.linear_kl")
            kl = kernels.kl_of_logits(z_p, z_q) if kl is None else kl
            if gradients:
                ones = torch.ones_like(kl)
                z_p, z_q = kernels.logit_gradients_(z_p, z_q, kl, ones, self.weight_p.dtype)
            return kl, z_p, z_q
        of_block = _kl_and_gradients_ if gradients else kl_of_logits
        kl = z_p.new_empty(len(z_p))
        for start in range(0, len(z_p), self.block):  # rows whose softmax work stays in the cache
            part = slice(start, start + self.block)
            kl[part] = of_block(z_p[part], z_q[part])
        return kl, z_p, z_q

    def _logits(self, x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        self.mm(x.to(weight.dtype), weight.t(), z, beta=0.0)
        return z if self.temperature == 1.0 else z.mul_(1.0 / self.temperature)

    def mm(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, beta: float) -> None:
        """out <- beta out + a b."""
        if self.half:
            torch.addmm(out, a, b, beta=beta, out_dtype=torch.float32, out=out)
        elif beta:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
