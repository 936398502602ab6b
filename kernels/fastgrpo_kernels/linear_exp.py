# SPDX-License-Identifier: Apache-2.0
"""The logits' matmul with the exponential in its epilogue: no fp32 logits in memory.

    z = x w^T,               E_j = exp((z_j - c) * scale) for j != y,   E_y := -S,
    S = sum_{j != y} E_j,    c = <x, w_y> by an ordinary dot product

Persistent programs walk tiles of (rows, columns) in groups of row blocks, so that a panel of w
stays in the L2 cache; operands and E move by TMA. Each tile leaves the sum of its columns for every
row, and a second kernel adds those in column order: fixed order, no atomics, bitwise reproducible.

The tensor cores round otherwise than a dot product, so the matmul's own z_y is returned too:
log p_y = -log(S + exp((z_y - c) scale)) + (z_y - c) scale holds one matmul's logits only.

It replaces `offset_exp` after a matmul once a measurement says so: `EPILOGUE` is off until then.

Letters: C rows of a chunk, D hidden size, V vocabulary.
"""

import math
import os

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch

EPILOGUE = False
LOG2_E = tl.constexpr(math.log2(math.e))
# One program a multiprocessor. 256 columns would halve the reads of x; they spill on sm_90.
ROWS, COLUMNS, DEPTH, GROUP = 128, 128, 64, 8
NUM_WARPS, NUM_STAGES = 8, 4
FINISH_ROWS, FINISH_TILES = 32, 32
PROGRAMS = 132  # where there is no device to ask


@triton.jit
def _tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row block, column block) of a tile: GROUP row blocks share each column block."""
    width = GROUP * tiles_n
    first = (tile // width) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % width) % size, (tile % width) // size


@triton.jit
def _store_half(e_desc, row, column, z, part_ptr, target_logit_ptr, y, c, scale, live, V):
    """E of half a tile, its row sums, and the target's logit if it lies here."""
    j = column + tl.arange(0, z.shape[1])[None, :]
    e = tl.exp2((z - c[:, None]) * scale[:, None])
    e = tl.where((j == y[:, None]) | (j >= V), 0.0, e)
    e_desc.store([row, column], e.to(tl.bfloat16))
    tl.store(part_ptr, tl.sum(e, 1), mask=live)
    own = tl.sum(tl.where(j == y[:, None], z, 0.0), 1)
    tl.store(target_logit_ptr, own, mask=live & (y >= column) & (y < column + z.shape[1]))


@triton.jit(do_not_specialize=["C"])
def _linear_exp_kernel(
    x_desc,
    w_desc,
    e_desc,
    y_ptr,
    c_ptr,
    scale_ptr,
    part_ptr,
    target_logit_ptr,
    C,
    V,
    D,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(C, ROWS), tl.cdiv(V, COLUMNS)
    HALF: tl.constexpr = COLUMNS // 2
    first, tiles = tl.program_id(0).to(tl.int64), tiles_m.to(tl.int64) * tiles_n
    for tile in tl.range(first, tiles, PROGRAMS, flatten=True):
        m, n = _tile(tile, tiles_m, tiles_n, GROUP)
        row, column = (m * ROWS).to(tl.int32), (n * COLUMNS).to(tl.int32)  # as TMA takes them
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, D, DEPTH):
            z = tl.dot(x_desc.load([row, k]), w_desc.load([column, k]).T, z)
        rows = row + tl.arange(0, ROWS)
        live = rows < C
        y = tl.load(y_ptr + rows, mask=live, other=-1).to(tl.int32)
        c = tl.load(c_ptr + rows, mask=live, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=live, other=0.0) * LOG2_E
        # Two halves: the exponentials of one are stored while the registers hold the other's sums.
        left, right = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, HALF)), (0, 2, 1)))
        part = part_ptr + 2 * n * C + rows
        _store_half(e_desc, row, column, left, part, target_logit_ptr + rows, y, c, scale, live, V)
        column += HALF
        _store_half(
            e_desc, row, column, right, part + C, target_logit_ptr + rows, y, c, scale, live, V
        )


@triton.jit(do_not_specialize=["C", "tiles", "row_stride"])
def _finish_kernel(
    part_ptr,
    exps_ptr,
    y_ptr,
    sum_exp_ptr,
    C,
    tiles,
    row_stride,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """S of each row, and E_y := -S."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < C
    sums = tl.zeros((TILES, ROWS), tl.float32)
    for first in range(0, tiles, TILES):
        t = (first + tl.arange(0, TILES)).to(tl.int64)[:, None]
        sums += tl.load(part_ptr + t * C + rows, mask=(t < tiles) & live, other=0.0)
    s = tl.sum(sums, 0)
    tl.store(sum_exp_ptr + rows, s, mask=live)
    y = tl.load(y_ptr + rows, mask=live, other=0)
    at = exps_ptr + rows * row_stride + y
    tl.store(at, (-s).to(exps_ptr.dtype.element_ty), mask=live)


@torch.library.custom_op("fastgrpo::linear_exp_triton", mutates_args=("exps",))
def linear_exp(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    exps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(S, c, the matmul's z_y), each (C,) float32 like `scale`; E into `exps`.

    x (C, D), weight (V, D) of one dtype, exps (C, V) bfloat16: rows contiguous and 16-byte
    aligned; targets (C,) int64 in [0, V).
    """
    C, (V, D) = len(x), weight.shape
    c = (x.float() * weight[targets].float()).sum(1)
    sum_exp, target_logit = torch.empty_like(c), torch.empty_like(c)
    tiles = triton.cdiv(V, COLUMNS)
    part = c.new_empty(2 * tiles, C)
    programs = PROGRAMS
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    if C:
        launch(
            _linear_exp_kernel,
            (min(programs, triton.cdiv(C, ROWS) * tiles),),
            x,
            TensorDescriptor.from_tensor(x, [ROWS, DEPTH]),
            TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
            TensorDescriptor.from_tensor(exps, [ROWS, COLUMNS // 2]),
            targets.contiguous(),
            c,
            scale.contiguous(),
            part,
            target_logit,
            C,
            V,
            D,
            PROGRAMS=programs,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            DEPTH=DEPTH,
            GROUP=GROUP,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
        grid = (triton.cdiv(C, FINISH_ROWS),)
        sizes = (C, 2 * tiles, exps.stride(0))
        tile = {"ROWS": FINISH_ROWS, "TILES": FINISH_TILES}
        launch(_finish_kernel, grid, x, part, exps, targets.contiguous(), sum_exp, *sizes, **tile)
    return sum_exp, c, target_logit


@linear_exp.register_fake
def _(x, weight, targets, scale, exps):
    return tuple(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3))


def serves(weight: torch.Tensor) -> bool:
    """Whether the epilogue is on and can take this weight: TMA wants Hopper and 16-byte rows."""
    able = os.environ.get("TRITON_INTERPRET") == "1"
    if weight.is_cuda:
        able = torch.cuda.get_device_capability(weight.device) >= (9, 0)
    V, D = weight.shape
    return EPILOGUE and able and weight.is_contiguous() and V % 8 == 0 and D % 8 == 0


def aot_specs() -> list[KernelSpec]:
    def descriptor(rows: int, columns: int) -> str:
        return f"tensordesc<bf16[{rows}, {columns}]>"

    pointers = dict.fromkeys(("c_ptr", "scale_ptr", "part_ptr"), "*fp32")
    signature = pointers | {"target_logit_ptr": "*fp32", "y_ptr": "*i64", "C": "i32"}
    signature |= {"V": "i32:16", "D": "i32:16"}
    signature |= {
        "x_desc": descriptor(ROWS, DEPTH),
        "w_desc": descriptor(COLUMNS, DEPTH),
        "e_desc": descriptor(ROWS, COLUMNS // 2),
    }
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH, "GROUP": GROUP}
    return [
        KernelSpec(
            _linear_exp_kernel,
            signature,
            tile | {"PROGRAMS": PROGRAMS},
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            matmul=True,
            archs=("sm_90", "sm_100"),
        ),
        KernelSpec(
            _finish_kernel,
            {"part_ptr": "*fp32", "exps_ptr": "*bf16", "y_ptr": "*i64", "sum_exp_ptr": "*fp32"}
            | dict.fromkeys(("C", "tiles", "row_stride"), "i32"),
            {"ROWS": FINISH_ROWS, "TILES": FINISH_TILES},
            label="linear_exp",
        ),
    ]
