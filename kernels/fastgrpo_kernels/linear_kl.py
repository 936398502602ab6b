# SPDX-License-Identifier: Apache-2.0
"""Full-vocabulary KL of two chunks of logits, and its gradients over the logits themselves.

    log p = z_p - lse(z_p),  log q = z_q - lse(z_q),  x = log q - log p
    KL(p || q) = sum_j p_j (e^x_j - 1 - x_j)          (sum_j q_j - p_j = 0 added: no term negative)
    dKL/dz_p = p (log p - log q - KL),   dKL/dz_q = q - p

One program per row reads both streams twice: for the two normalisers (online, per lane), and for
the KL or the gradients. Gradients replace the logits, as fp32 or as bf16 over the fp32 values with
the barrier that `offset_exp` explains. Fixed order, no atomics: bitwise reproducible.

Letters: C rows of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch
from fastgrpo_kernels.token_kl import excess

BLOCK, NUM_WARPS = 1024, 4
# Left to itself ptxas spills in a loop of the gradients on sm_100 (triton 3.6), to fit a ninth
# program on a multiprocessor.
GRAD_OPTIONS = {"maxnreg": 64}


@triton.jit
def _columns(first, BLOCK: tl.constexpr):
    """Four columns per thread whatever the dtypes, so that every kernel adds in one order."""
    return tl.max_contiguous(first + tl.arange(0, BLOCK), 4)


@triton.jit
def _normaliser(m, s):
    """(maximum, log of the sum about it) of a row from its lanes' running pairs."""
    top = tl.max(m, 0)
    return top, tl.log(tl.sum(s * tl.exp(m - top), 0))


@triton.jit
def _normalisers(p_ptr, q_ptr, V, BLOCK: tl.constexpr):
    # A finite floor: the maximum of -inf alone would make -inf - -inf.
    m_p, s_p = tl.full((BLOCK,), -3.0e38, tl.float32), tl.zeros((BLOCK,), tl.float32)
    m_q, s_q = m_p, s_p
    for first in range(0, V, BLOCK):
        j = _columns(first, BLOCK)
        z_p = tl.load(p_ptr + j, mask=j < V, other=float("-inf"))
        z_q = tl.load(q_ptr + j, mask=j < V, other=float("-inf"))
        new_p, new_q = tl.maximum(m_p, z_p), tl.maximum(m_q, z_q)
        s_p = s_p * tl.exp(m_p - new_p) + tl.exp(z_p - new_p)
        s_q = s_q * tl.exp(m_q - new_q) + tl.exp(z_q - new_q)
        m_p, m_q = new_p, new_q
    top_p, log_p = _normaliser(m_p, s_p)
    top_q, log_q = _normaliser(m_q, s_q)
    # log q - log p = (z_q - z_p) - shift, which does not cancel when p is close to q.
    return top_p, log_p, top_q, log_q, (top_q - top_p) + (log_q - log_p)


@triton.jit
def _close(z_p, z_q, p, shift):
    """x = log q - log p (0 where p is 0), whether |x| < 1, and there e^x - 1 - x."""
    possible = p != 0  # True for NaN
    x = tl.where(possible, (z_q - z_p) - shift, 0.0)
    near = possible & (tl.abs(x) < 1.0)
    return x, near, excess(tl.where(near, x, 0.0))


@triton.jit
def _kl_kernel(p_ptr, q_ptr, kl_ptr, V, p_stride, q_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p_ptr += row * p_stride
    q_ptr += row * q_stride
    top_p, norm_p, top_q, norm_q, shift = _normalisers(p_ptr, q_ptr, V, BLOCK)
    kl = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        j = _columns(first, BLOCK)
        inside = j < V
        z_p = tl.load(p_ptr + j, mask=inside, other=float("-inf"))
        z_q = tl.load(q_ptr + j, mask=inside, other=float("-inf"))
        p, q = tl.exp((z_p - top_p) - norm_p), tl.exp((z_q - top_q) - norm_q)
        x, near, e = _close(z_p, z_q, p, shift)
        far = q - p - tl.where(p != 0, p * x, 0.0)
        kl += tl.where(inside, tl.where(near, p * e, far), 0.0)
    tl.store(kl_ptr + row, tl.sum(kl, 0))


@triton.jit(do_not_specialize_on_alignment=["kl_ptr", "dkl_ptr"])  # slices of longer tensors
def _kl_grad_kernel(
    p_ptr,
    q_ptr,
    dp_ptr,
    dq_ptr,
    kl_ptr,
    dkl_ptr,
    V,
    p_stride,
    q_stride,
    dp_stride,
    dq_stride,
    OVERLAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_ptr += row * p_stride
    q_ptr += row * q_stride
    dp_ptr += row * dp_stride
    dq_ptr += row * dq_stride
    kl, g = tl.load(kl_ptr + row), tl.load(dkl_ptr + row)
    top_p, norm_p, top_q, norm_q, shift = _normalisers(p_ptr, q_ptr, V, BLOCK)
    tl.debug_barrier()  # every thread has read the row before any of it is overwritten
    for first in range(0, V, BLOCK):
        j = _columns(first, BLOCK)
        inside = j < V
        z_p = tl.load(p_ptr + j, mask=inside, other=float("-inf"))
        z_q = tl.load(q_ptr + j, mask=inside, other=float("-inf"))
        p, q = tl.exp((z_p - top_p) - norm_p), tl.exp((z_q - top_q) - norm_q)
        x, near, e = _close(z_p, z_q, p, shift)
        dp = tl.where(p != 0, p * (-x - kl), 0.0) * g
        dq = tl.where(near, p * (e + x), q - p) * g
        if OVERLAY:
            tl.debug_barrier()  # no store before every thread has its loads
        tl.store(dp_ptr + j, dp.to(dp_ptr.dtype.element_ty), mask=inside)
        tl.store(dq_ptr + j, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastgrpo::kl_of_logits_triton", mutates_args=())
def kl_of_logits(z_p: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """(C,) KL(softmax(z_p) || softmax(z_q)) of float32 (C, V) logits with contiguous rows."""
    C, V = z_p.shape
    assert z_p.dtype == z_q.dtype == torch.float32
    assert V == 1 or z_p.stride(1) == z_q.stride(1) == 1
    kl = z_p.new_empty(C)
    numbers = (V, z_p.stride(0), z_q.stride(0))
    launch(_kl_kernel, (C,), z_p, z_p, z_q, kl, *numbers, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return kl


@kl_of_logits.register_fake
def _(z_p, z_q):
    return z_p.new_empty(z_p.shape[0])


@torch.library.custom_op("fastgrpo::kl_logit_gradients_triton", mutates_args=("z_p", "z_q"))
def _logit_gradients(
    z_p: torch.Tensor, z_q: torch.Tensor, kl: torch.Tensor, dkl: torch.Tensor, overlay: bool
) -> None:
    C, V = z_p.shape
    assert z_p.dtype == z_q.dtype == torch.float32
    assert V == 1 or z_p.stride(1) == z_q.stride(1) == 1
    assert not overlay or C < 2 or min(z_p.stride(0), z_q.stride(0)) >= V, "rows must not overlap"
    dz_p, dz_q = (z.view(torch.bfloat16) if overlay else z for z in (z_p, z_q))
    launch(
        _kl_grad_kernel,
        (C,),
        z_p,
        z_p,
        z_q,
        dz_p,
        dz_q,
        kl.contiguous(),
        dkl.contiguous(),
        V,
        z_p.stride(0),
        z_q.stride(0),
        dz_p.stride(0),
        dz_q.stride(0),
        OVERLAY=overlay,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        **GRAD_OPTIONS,
    )


def logit_gradients_(
    z_p: torch.Tensor,
    z_q: torch.Tensor,
    kl: torch.Tensor,
    dkl: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace float32 logits by dkl times the gradients of their KL; returns views of `dtype`.

    bfloat16 gradients lie in the first half of each row of the float32 logits' memory.
    """
    overlay, V = dtype == torch.bfloat16, z_p.shape[1]
    _logit_gradients(z_p, z_q, kl, dkl, overlay)
    return tuple(z.view(dtype)[:, :V] if overlay else z for z in (z_p, z_q))


def aot_specs() -> list[KernelSpec]:
    sizes = {"V": "i32:16", "p_stride": "i32:16", "q_stride": "i32:16"}
    logits = {"p_ptr": "*fp32", "q_ptr": "*fp32", "kl_ptr": "*fp32"}
    specs = [KernelSpec(_kl_kernel, logits | sizes, {"BLOCK": BLOCK}, num_warps=NUM_WARPS)]
    for dtype in ("*bf16", "*fp32"):
        signature = logits | sizes | {"dkl_ptr": "*fp32", "dp_ptr": dtype, "dq_ptr": dtype}
        specs.append(
            KernelSpec(
                _kl_grad_kernel,
                signature | {"dp_stride": "i32:16", "dq_stride": "i32:16"},
                {"OVERLAY": dtype == "*bf16", "BLOCK": BLOCK},
                num_warps=NUM_WARPS,
                label=dtype[1:],
                options=GRAD_OPTIONS,
            )
        )
    return specs
