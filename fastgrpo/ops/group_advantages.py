# SPDX-License-Identifier: Apache-2.0
"""group_advantages: rewards of ragged groups to advantages."""

from collections.abc import Sequence

import torch

from fastgrpo.checks import check_choice, check_tensor
from fastgrpo.errors import InputError
from fastgrpo.ops.select import select
from fastgrpo.reference.group_advantages import group_advantages as reference


def group_advantages(
    rewards: torch.Tensor | Sequence[float | None],
    group_sizes: int | Sequence[int] | torch.Tensor,
    *,
    scale_rewards: str = "group",
    baseline: str = "mean",
    eps: float = 1e-4,
    impl: str | None = None,
    validate: bool | None = None,
) -> torch.Tensor:
    """Advantages of completions relative to their group.

        A_i = (r_i - b_i) / (s + eps)
        b_i = mean of the group ("mean"), or of the rest of the group ("leave_one_out")
        s   = unbiased standard deviation (ddof 1) of the group ("group") or of all rewards
              ("batch"); "none" divides by nothing

    Args:
        rewards: (B,) floating, groups one after another. NaN (None in a list) means not scored:
            left out of every statistic, advantage exactly 0. inf: InputError naming the row on CPU
            or with validate=True; on CUDA, where nothing is read back, its group is NaN.
        group_sizes: completions per group, an int or (P,) ragged (0 allowed). Sizes that do not
            add up to B: InputError; if they lie on CUDA, every advantage is NaN (InputError with
            validate=True).
        impl: "reference" or "triton".

    Returns (B,) float32 (float64 from float64). Equal rewards, a group of one and a lone scored
    reward give exactly 0, whatever their size. Not differentiable.
    Source: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740); eps as TRL.
    """
    if not isinstance(rewards, torch.Tensor):
        values = [float("nan") if r is None else float(r) for r in rewards]
        rewards = torch.tensor(values, dtype=torch.float32)
    check_tensor("rewards", rewards, "B", floating=True)
    check_choice("scale_rewards", scale_rewards, ("group", "batch", "none"))
    check_choice("baseline", baseline, ("mean", "leave_one_out"))
    rewards = rewards.detach()
    chosen = select("group_advantages", rewards.device, impl)
    if validate is None and (chosen == "reference" or rewards.device.type == "cpu"):
        validate = True
    if validate:
        _check_finite(rewards)
    sizes = _sizes(group_sizes, len(rewards), validate)
    if chosen == "triton":
        from fastgrpo_kernels.group_advantages import group_advantages as kernel

        if isinstance(sizes, int):
            return kernel(rewards, sizes, sizes, scale_rewards, baseline, eps)
        largest = int(sizes.max()) if _readable(sizes, validate) and len(sizes) else None
        return kernel(rewards, sizes.to(rewards.device), largest, scale_rewards, baseline, eps)
    if isinstance(sizes, int):
        sizes = torch.full((len(rewards) // sizes,), sizes)
    sizes = sizes.to(rewards.device)
    ids = torch.arange(len(sizes), device=rewards.device)
    group_ids = torch.repeat_interleave(ids, sizes, output_size=len(rewards))
    out = reference(rewards, group_ids, len(sizes), scale_rewards, baseline, eps)
    return out.to(torch.promote_types(rewards.dtype, torch.float32))


def _readable(sizes: torch.Tensor, validate: bool | None) -> bool:
    """Whether the sizes may be looked at: on the GPU that waits for it."""
    return bool(validate) or (validate is None and sizes.device.type == "cpu")


def _check_finite(rewards: torch.Tensor) -> None:
    infinite = rewards.isinf()
    if bool(infinite.any()):
        row = int(infinite.nonzero()[0, 0])
        raise InputError(f"rewards: row {row} is {float(rewards[row])}, expected finite or NaN")


def _sizes(
    group_sizes: int | Sequence[int] | torch.Tensor, B: int, validate: bool | None
) -> int | torch.Tensor:
    """The group sizes, an int or (P,) int64 on the device they came on, that add up to B."""
    if isinstance(group_sizes, int):
        if group_sizes < 1 or B % group_sizes:
            raise InputError(f"group_sizes: expected a divisor of B={B}, got {group_sizes}")
        return group_sizes
    sizes = torch.as_tensor(group_sizes)
    integers = not sizes.is_floating_point() and sizes.dtype != torch.bool
    if sizes.dim() != 1 or (len(sizes) and not integers):
        raise InputError(f"group_sizes: expected an int or (P,) integers, got {group_sizes!r}")
    if _readable(sizes, validate) and (bool((sizes < 0).any()) or int(sizes.sum()) != B):
        raise InputError(
            f"group_sizes: expected sizes >= 0 that add up to B={B}, got a sum of "
            f"{int(sizes.sum())} and a minimum of {int(sizes.min()) if len(sizes) else None}"
        )
    return sizes.long()
