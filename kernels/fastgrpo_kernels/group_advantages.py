"""Group-relative advantages of ragged groups.

A program takes several consecutive groups, one per row of its tile, and walks their rewards four
times (from the cache after the first): minimum and count, mean, variance, advantages. Everything is
taken about the group's minimum in float64, so equal rewards give exactly 0. NaN rewards are left
out and get 0. Fixed order, no atomics: bitwise reproducible.

Letters: B rewards, P groups.
"""

import torch
import triton
import triton.language as tl

from fastgrpo_kernels.aot import KernelSpec

TILE = 1024


@triton.jit
def _rewards(rewards_ptr, i, inside):
    """Rewards in float64 and which of them are scored."""
    r = tl.load(rewards_ptr + i, mask=inside, other=float("nan")).to(tl.float64)
    return r, r == r


@triton.jit(do_not_specialize=["P"])
def _group_advantages_kernel(
    rewards_ptr,
    starts_ptr,
    batch_std_ptr,
    advantages_ptr,
    P,
    eps,
    GROUP_STD: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = tl.load(starts_ptr + group, mask=group < P, other=0)
    end = tl.load(starts_ptr + group + 1, mask=group < P, other=0)
    longest = tl.max(end - start)
    lane = tl.arange(0, COLUMNS)[None, :]

    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float64)
    count = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, longest, COLUMNS):
        i = start + first + lane
        r, scored = _rewards(rewards_ptr, i, i < end)
        low = tl.minimum(low, tl.where(scored, r, float("inf")))
        count += scored.to(tl.float64)
    low = tl.min(low, 1, keep_dims=True)
    count = tl.sum(count, 1, keep_dims=True)
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

    for first in range(0, longest, COLUMNS):
        i = start + first + lane
        r, scored = _rewards(rewards_ptr, i, i < end)
        advantage = tl.where(scored, ((r - low) - mean) * scale, 0.0)
        tl.store(advantages_ptr + i, advantage.to(advantages_ptr.dtype.element_ty), mask=i < end)


@torch.library.custom_op("fastgrpo::group_advantages_triton", mutates_args=())
def _group_advantages(
    rewards: torch.Tensor, sizes: torch.Tensor, scale_rewards: str, baseline: str, eps: float
) -> torch.Tensor:
    out = _output(rewards)
    P = len(sizes)
    if not len(rewards):
        return out
    rewards = rewards.contiguous()
    starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    # Two tile widths: groups as usual, and groups that are large themselves.
    columns = 16 if int(sizes.max()) <= 64 else 256
    rows = TILE // columns
    _group_advantages_kernel[(triton.cdiv(P, rows),)](
        rewards,
        starts,
        _batch_std(rewards) if scale_rewards == "batch" else None,
        out,
        P,
        float(eps),
        GROUP_STD=scale_rewards == "group",
        LEAVE_ONE_OUT=baseline == "leave_one_out",
        ROWS=rows,
        COLUMNS=columns,
    )
    return out


@_group_advantages.register_fake
def _(rewards, sizes, scale_rewards, baseline, eps):
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
    sizes: torch.Tensor,
    scale_rewards: str = "group",
    baseline: str = "mean",
    eps: float = 1e-4,
) -> torch.Tensor:
    """(B,) advantages of rewards (B,) in groups of `sizes` (P,) int64; not differentiable."""
    return _group_advantages(rewards, sizes, scale_rewards, baseline, eps)


def aot_specs() -> list[KernelSpec]:
    def spec(label: str, group_std: bool, batch: bool, columns: int) -> KernelSpec:
        pointers = {"rewards_ptr": "*fp32", "advantages_ptr": "*fp32", "starts_ptr": "*i64"}
        return KernelSpec(
            _group_advantages_kernel,
            pointers | {"P": "i32", "eps": "fp32"} | ({"batch_std_ptr": "*fp64"} if batch else {}),
            {
                "GROUP_STD": group_std,
                "LEAVE_ONE_OUT": not group_std,
                "ROWS": TILE // columns,
                "COLUMNS": columns,
            }
            | ({} if batch else {"batch_std_ptr": None}),
            label=label,
        )

    return [
        spec("group", True, False, 16),
        spec("group large", True, False, 256),
        spec("batch", False, True, 16),
        spec("none", False, False, 16),
    ]
