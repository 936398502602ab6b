# SPDX-License-Identifier: Apache-2.0
"""One-to-one matching of predictions with ground truth from a score per pair."""

from collections.abc import Sequence

import torch

from fastgrpo.checks import check_choice, check_tensor
from fastgrpo.errors import InputError, require
from fastgrpo.ops._boxes import as_sizes, check_same_samples, pair_counts, starts
from fastgrpo.ops.select import select, why_not
from fastgrpo.reference import match_boxes as reference


def match_boxes(
    scores: torch.Tensor,
    offsets: torch.Tensor,
    a_sizes: Sequence[int] | torch.Tensor,
    b_sizes: Sequence[int] | torch.Tensor,
    *,
    method: str = "optimal",
    threshold: float | None = None,
    mask: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Match the rows of every sample's score matrix with its columns, each at most once.

    scores, offsets: as `pairwise_box_iou` returns them, or any other score of the pairs, higher is
    better. Returns (sum a_sizes,) int64 on the device of `scores`: the column of each row within
    its sample, or -1.

    A pair may be matched when its score is a finite number (at most 1e100 in absolute value), at
    least `threshold`, and `mask` ((number of pairs,) bool, e.g. equal labels) is true there.
    method:
      "optimal"      as many allowed pairs as can be matched together, and of all such matchings one
                     with the largest sum of scores (the assignment problem, rectangular);
      "greedy"       repeatedly the best remaining pair; of equal ones the lowest row, then column;
      "greedy_rows"  each row in the given order takes its best remaining column, of equal ones the
                     lowest: sort the rows by confidence for the usual detection matching.

    impl: "reference" (scipy and loops), "cpp", "cuda"; None picks the fastest that serves.
    Computed in float64. Not differentiable. Raises InputError when sizes and scores disagree.
    """
    check_choice("method", method, reference.METHODS)
    a_sizes, b_sizes = as_sizes("a_sizes", a_sizes), as_sizes("b_sizes", b_sizes)
    check_same_samples(("a_sizes", "b_sizes"), a_sizes, b_sizes)
    pair_starts = starts(pair_counts(a_sizes, b_sizes), torch.device("cpu"))
    _check_pairs(scores, offsets, mask, pair_starts)
    if threshold is not None and threshold != threshold:
        raise InputError("threshold: expected a number or None, got nan")
    scores = scores.detach()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.double()
    impl = _choose(scores.device, method, [*a_sizes, *b_sizes], impl)
    if impl == "reference":
        if method == "optimal":
            require("match_boxes(impl='reference')", "rewards", "scipy")
        return reference.match_boxes(
            scores, a_sizes, b_sizes, method=method, threshold=threshold, mask=mask
        )
    a_start, b_start = (starts(sizes, pair_starts.device) for sizes in (a_sizes, b_sizes))
    if impl == "cuda":
        from fastgrpo_kernels._cuda import match_boxes as kernel

        where = [t.to(scores.device) for t in (a_start, b_start, pair_starts)]
        largest = (max(a_sizes, default=0), max(b_sizes, default=0))
        return kernel(scores, mask, *where, sum(a_sizes), method, threshold, *largest)
    from fastgrpo_kernels._cpp import match_boxes as kernel

    mask = None if mask is None else mask.cpu()
    columns = kernel(
        scores.cpu(), mask, a_start, b_start, pair_starts, sum(a_sizes), method, threshold
    )
    return columns.to(scores.device)


def _choose(device: torch.device, method: str, sizes: list[int], impl: str | None) -> str:
    chosen = select("match_boxes", device, impl)
    if chosen == "cuda":
        from fastgrpo_kernels._cuda import MAX_SIZE

        if max(sizes, default=0) > MAX_SIZE[method]:
            if impl is not None:
                raise InputError(
                    f"impl: 'cuda' matches at most {MAX_SIZE[method]} rows and columns by "
                    f"method {method!r}, got {max(sizes)}"
                )
            return next(
                i for i in ("cpp", "reference") if why_not("match_boxes", i, device) is None
            )
    return chosen


def _check_pairs(scores, offsets, mask, starts: torch.Tensor) -> None:
    expected = starts.tolist()
    check_tensor("scores", scores, "pairs", like={"pairs": expected[-1]})
    if (offsets.tolist() if isinstance(offsets, torch.Tensor) else list(offsets)) != expected:
        raise InputError("offsets: expected the running sum of a_sizes * b_sizes from 0")
    if mask is not None:
        like = {"pairs": expected[-1]}
        check_tensor("mask", mask, "pairs", like=like, dtypes=(torch.bool,), device=scores.device)
