# SPDX-License-Identifier: Apache-2.0
"""Group-relative advantages of ragged groups.

A program takes several consecutive groups, one per row of its tile, and walks their rewards four
times (from the cache after the first): minimum and count, mean, variance, advantages. Everything is
taken about the group's minimum in float64, so equal rewards give exactly 0. NaN rewards are left
out and get 0; an infinite one makes its group NaN. Fixed order, no atomics, nothing read on the
host: bitwise reproducible.

Letters: B rewards, P groups.
"""

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec
from fastgrpo_kernels.launch import launch

TILE = 512
WIDEST = 256  # columns of a tile for groups that are large themselves


@triton.jit
def _rewards(rewards_ptr, i, inside):
    """Rewards in float64 and which of them are scored."""
    r = tl.load(rewards_ptr + i, mask=inside, other=float("nan")).to(tl.float64)
    return r, r == r


@triton.jit
def _extent(starts_ptr, group, P, B, size):
    """Where each group's rewards start and end; groups after the last are empty."""
    if starts_ptr is None:
        return group * size, tl.where(group < P, (group + 1) * size, group * size)
    else:
        start = tl.load(starts_ptr + group, mask=group < P, other=0)
        end = tl.load(starts_ptr + group + 1, mask=group < P, other=0)
        return start, tl.minimum(end, B)


@triton.jit(
    do_not_specialize=["P", "B", "size"],
    do_not_specialize_on_alignment=["rewards_ptr", "starts_ptr"],
)
def _group_advantages_kernel(
    rewards_ptr,
    starts_ptr,
    wrong_ptr,
    batch_std_ptr,
    advantages_ptr,
    P,
    B,
    size,
    eps,
    GROUP_STD: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start, end = _extent(starts_ptr, group, P, B, size)
    longest = tl.max(end - start)
    lane = tl.arange(0, COLUMNS)[None, :]

    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float64)
    count = tl.zeros((ROWS, COLUMNS), tl.int32)
    infinite = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(0, longest, COLUMNS):
        i = start + first + lane
        r, scored = _rewards(rewards_ptr, i, i < end)
        low = tl.minimum(low, tl.where(scored, r, float("inf")))
        count += scored.to(tl.int32)
        infinite += (tl.abs(r) == float("inf")).to(tl.int32)
    low = tl.min(low, 1, keep_dims=True)
    count = tl.sum(count, 1, keep_dims=True).to(tl.float64)
    others = tl.maximum(count - 1.0, 1.0)

    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, longest, COLUMNS):
        i = start + first + lane
        r, scored = _rewards(rewards_ptr, i, i < end)
        total += tl.where(scored, r - low, 0.0)
    mean = tl.sum(total, 1, keep_dims=True) / tl.maximum(count, 1.0)

    scale = tl.zeros((ROWS, 1), tl.float64) + 1.0
    if LEAVE_ONE_OUT:
        scale = count / others
    if GROUP_STD:
        total = tl.zeros((ROWS, COLUMNS), tl.float64)
        for first in range(0, longest, COLUMNS):
            i = start + first + lane
            r, scored = _rewards(rewards_ptr, i, i < end)
            centred = tl.where(scored, (r - low) - mean, 0.0)
            total += centred * centred
        scale = scale / (tl.sqrt(tl.sum(total, 1, keep_dims=True) / others) + eps)
    if batch_std_ptr is not None:
        scale = scale / (tl.load(batch_std_ptr) + eps)
    poisoned = tl.sum(infinite, 1, keep_dims=True) > 0
    if wrong_ptr is not None:
        poisoned = poisoned | (tl.load(wrong_ptr) != 0)
    scale = tl.where(poisoned, float("nan"), scale)

    for first in range(0, longest, COLUMNS):
        i = start + first + lane
        r, scored = _rewards(rewards_ptr, i, i < end)
        advantage = tl.where(scored, ((r - low) - mean) * scale, 0.0)
        tl.store(advantages_ptr + i, advantage.to(advantages_ptr.dtype.element_ty), mask=i < end)


@torch.library.custom_op("fastgrpo::group_advantages_triton", mutates_args=())
def _group_advantages(
    rewards: torch.Tensor,
    sizes: torch.Tensor | None,
    size: int,
    largest: int | None,
    scale_rewards: str,
    baseline: str,
    eps: float,
) -> torch.Tensor:
    B, wrong, starts = len(rewards), None, None
    P = B // max(size, 1) if sizes is None else len(sizes)
    out = _output(rewards)
    if not B or not P:
        return out
    if sizes is not None:
        starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    if sizes is not None and largest is None:
        wrong = (starts[-1] != B) | (sizes < 0).any()  # left to the kernel: no look on the host
        out.fill_(torch.nan)
        largest = -(-B // P)
    columns = min(triton.next_power_of_2(max(largest, 1)), WIDEST)
    rows = TILE // columns
    launch(
        _group_advantages_kernel,
        (triton.cdiv(P, rows),),
        rewards,
        rewards.contiguous(),
        starts,
        wrong,
        _batch_std(rewards) if scale_rewards == "batch" else None,
        out,
        P,
        B,
        size,
        float(eps),
        GROUP_STD=scale_rewards == "group",
        LEAVE_ONE_OUT=baseline == "leave_one_out",
        ROWS=rows,
        COLUMNS=columns,
    )
    return out


@_group_advantages.register_fake
def _(rewards, sizes, size, largest, scale_rewards, baseline, eps):
    return _output(rewards)


def _output(rewards: torch.Tensor) -> torch.Tensor:
    return rewards.new_empty(rewards.shape, dtype=torch.promote_types(rewards.dtype, torch.float32))


def _batch_std(rewards: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of all scored rewards, float64, 0 for fewer than two."""
    scored = ~rewards.isnan()
    count = scored.sum().double()
    r = torch.where(scored, rewards.double(), torch.inf)
    r = torch.where(scored, r - r.amin(), 0.0)
    centred = torch.where(scored, r - r.sum() / count.clamp(min=1.0), 0.0)
    return (centred.square().sum() / (count - 1.0).clamp(min=1.0)).sqrt()


def group_advantages(
    rewards: torch.Tensor,
    sizes: torch.Tensor | int,
    largest: int | None = None,
    scale_rewards: str = "group",
    baseline: str = "mean",
    eps: float = 1e-4,
) -> torch.Tensor:
    """(B,) advantages of rewards (B,) in groups of `sizes`, (P,) int64 or one number for all.

    largest: the largest of checked sizes; None for sizes nobody has looked at: if they do not add
    up to B every advantage is NaN. Not differentiable.
    """
    uniform = isinstance(sizes, int)
    return _group_advantages(
        rewards,
        None if uniform else sizes,
        sizes if uniform else 0,
        sizes if uniform else largest,
        scale_rewards,
        baseline,
        eps,
    )


def aot_specs() -> list[KernelSpec]:
    optional = {"starts_ptr": "*i64", "wrong_ptr": "*i1", "batch_std_ptr": "*fp64"}
    numbers = {"P": "i32", "B": "i32", "size": "i32", "eps": "fp32"}

    def spec(label: str, group_std: bool, columns: int, *present: str) -> KernelSpec:
        return KernelSpec(
            _group_advantages_kernel,
            {"rewards_ptr": "*fp32", "advantages_ptr": "*fp32"}
            | numbers
            | {name: optional[name] for name in present},
            {
                "GROUP_STD": group_std,
                "LEAVE_ONE_OUT": not group_std,
                "ROWS": TILE // columns,
                "COLUMNS": columns,
            }
            | {name: None for name in optional if name not in present},
            label=label,
        )

    return [
        spec("group", True, 8),
        spec("group ragged", True, 16, "starts_ptr"),
        spec("group large", True, WIDEST, "starts_ptr", "wrong_ptr"),
        spec("batch", False, 16, "starts_ptr", "batch_std_ptr"),
        spec("none", False, 16, "starts_ptr"),
    ]
