# SPDX-License-Identifier: Apache-2.0
"""Turn a chunk's exponentials into logit gradients where the factor differs along a row.

    E_j <- E_j (g + h (ln E_j + c)) (1 - clamp((T ln E_j + m) / softcap, -1, 1)^2),   E_y <- e_y

with per-row numbers: g and h the gradients of log-prob and entropy, c = H - ln Z, m + T ln E_j the
capped logit; the second factor only with a softcap. In place, one read and one write, one program
per row; an entry of 0 stays 0. Element-wise, so deterministic.

Letters: C rows of a chunk, V vocabulary (of this shard).
"""

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch

BLOCK, NUM_WARPS = 2048, 4


# Per-row arguments are slices of longer tensors: their alignment must not choose a variant.
@triton.jit(
    do_not_specialize_on_alignment=[
        *("targets_ptr", "g_ptr", "h_ptr", "c_ptr"),
        *("temperature_ptr", "middle_ptr", "at_target_ptr"),
    ]
)
def _weigh_exps_kernel(
    exps_ptr,
    targets_ptr,
    g_ptr,
    h_ptr,
    c_ptr,
    temperature_ptr,
    middle_ptr,
    at_target_ptr,
    V,
    row_stride,
    softcap,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    exps_ptr += row * row_stride
    y, at_target = tl.load(targets_ptr + row), tl.load(at_target_ptr + row)
    g = tl.load(g_ptr + row)
    for first in range(0, V, BLOCK):
        j = first + tl.arange(0, BLOCK)
        e = tl.load(exps_ptr + j, mask=j < V, other=0.0).to(tl.float32)
        ln_e = tl.where(e > 0, tl.log(tl.where(e > 0, e, 1.0)), 0.0)
        factor = tl.zeros((BLOCK,), tl.float32) + g
        if h_ptr is not None:
            factor += tl.load(h_ptr + row) * (ln_e + tl.load(c_ptr + row))
        if middle_ptr is not None:
            f = (tl.load(temperature_ptr + row) * ln_e + tl.load(middle_ptr + row)) / softcap
            f = tl.minimum(tl.maximum(f, -1.0), 1.0)
            factor *= 1.0 - f * f
        out = tl.where(j == y, at_target, tl.where(e == 0, 0.0, e * factor))
        tl.store(exps_ptr + j, out.to(exps_ptr.dtype.element_ty), mask=j < V)


@torch.library.custom_op("fastgrpo::weigh_exps_triton", mutates_args=("exps",))
def weigh_exps_(
    exps: torch.Tensor,
    targets: torch.Tensor,
    g: torch.Tensor,
    h: torch.Tensor | None,
    c: torch.Tensor | None,
    temperature: torch.Tensor | None,
    middle: torch.Tensor | None,
    at_target: torch.Tensor,
    softcap: float,
) -> None:
    """exps (C, V) float32 or bfloat16, contiguous rows, overwritten; the rest (C,) float32, targets
    int64 (outside [0, V): on another shard). h and c, temperature and middle come in pairs."""
    C, V = exps.shape
    assert V == 1 or exps.stride(1) == 1
    numbers = (g, h, c, temperature, middle, at_target)
    launch(
        _weigh_exps_kernel,
        (C,),
        exps,
        exps,
        targets.contiguous(),
        *(None if x is None else x.contiguous() for x in numbers),
        V,
        exps.stride(0),
        float(softcap),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


@weigh_exps_.register_fake
def _(exps, targets, g, h, c, temperature, middle, at_target, softcap):
    return None


def aot_specs() -> list[KernelSpec]:
    rows = {"g_ptr": "*fp32", "at_target_ptr": "*fp32", "targets_ptr": "*i64"}
    sizes = {"V": "i32:16", "row_stride": "i32:16", "softcap": "fp32"}
    pairs = {"entropy": ("h_ptr", "c_ptr"), "softcap": ("temperature_ptr", "middle_ptr")}
    specs = []
    for dtype in ("*bf16", "*fp32"):
        for label in ("entropy", "softcap", "entropy softcap"):
            present = [p for name in label.split() for p in pairs[name]]
            absent = [p for pair in pairs.values() for p in pair if p not in present]
            specs.append(
                KernelSpec(
                    _weigh_exps_kernel,
                    rows | sizes | {"exps_ptr": dtype} | dict.fromkeys(present, "*fp32"),
                    {"BLOCK": BLOCK} | dict.fromkeys(absent),
                    num_warps=NUM_WARPS,
                    label=f"{dtype[1:]} {label}",
                )
            )
    return specs
