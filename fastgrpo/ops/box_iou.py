# SPDX-License-Identifier: Apache-2.0
"""Overlap of boxes: element by element, and every pair of ragged batches."""

from collections.abc import Sequence

import torch

from fastgrpo.checks import check_choice
from fastgrpo.errors import InputError
from fastgrpo.ops._boxes import as_box_pair, as_sizes, check_same_samples, pair_counts, starts
from fastgrpo.ops.select import select
from fastgrpo.reference import box_iou as reference


def box_iou(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    kind: str = "iou",
    convention: str = "continuous",
) -> torch.Tensor:
    """Overlap of boxes (x1, y1, x2, y2), element by element with broadcasting.

    With I, U the areas of intersection and union, H that of the smallest enclosing box, d the
    distance of the centres, c the diagonal of the enclosing box, and
    v = 4 / pi^2 (atan(w_a / h_a) - atan(w_b / h_b))^2, alpha = v / (1 - I/U + v):

        iou = I / U    giou = iou - (H - U) / H    diou = iou - d^2 / c^2    ciou = diou - alpha v

    convention: "continuous", lengths x2 - x1; "pixel", both ends inclusive, lengths x2 - x1 + 1;
    "vlm_r1", continuous but an overlap that is at most one unit wide or high counts as none, as
    VLM-R1 and the systems derived from it compute it.

    a, b: (..., 4), any real dtype; computed and returned in float64 if either is float64 or of
    integers, else float32. Differentiable in both (alpha is a constant, as in the CIoU paper),
    finite everywhere. A box that is not finite, has x2 < x1 or y2 < y1, or a coordinate beyond
    sqrt(largest float) / 4 (3e153, in float32 4e18) scores as no box, whatever the other: iou 0,
    giou -1, diou -1, ciou -1.5, the lower ends of their ranges. 0/0 counts as 0.

    Sources: Rezatofighi et al. 2019 (giou), Zheng et al. 2020 (diou, ciou).
    Raises InputError for another last dimension than 4 and for shapes that do not broadcast.
    """
    check_choice("kind", kind, reference.KINDS)
    check_choice("convention", convention, reference.CONVENTIONS)
    a, b = as_box_pair("ab", a, b)
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError as error:
        raise InputError(f"a, b: expected shapes that broadcast, {error}") from error
    return reference.box_iou(a, b, kind=kind, convention=convention)


def pairwise_box_iou(
    a: torch.Tensor,
    b: torch.Tensor,
    a_sizes: Sequence[int] | torch.Tensor,
    b_sizes: Sequence[int] | torch.Tensor,
    *,
    kind: str = "iou",
    convention: str = "continuous",
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlap of every box of `a` with every box of `b` of the same sample.

    a: (sum a_sizes, 4), b: (sum b_sizes, 4), samples after one another. Returns values
    (sum_s a_s * b_s,), each sample's (a_s, b_s) block row-major, and offsets (B + 1,) int64 where
    the blocks start. Values, dtypes, gradients and invalid boxes as in `box_iou`.
    impl: "reference", "cpp" (CPU, no gradient), "triton" (CUDA); None picks the fastest there is.
    """
    check_choice("kind", kind, reference.KINDS)
    check_choice("convention", convention, reference.CONVENTIONS)
    a, b = as_box_pair("ab", a, b, ndim=2)
    a_sizes, b_sizes = as_sizes("a_sizes", a_sizes, len(a)), as_sizes("b_sizes", b_sizes, len(b))
    check_same_samples(("a_sizes", "b_sizes"), a_sizes, b_sizes)
    pairs = pair_counts(a_sizes, b_sizes)
    offsets = starts(pairs, a.device)
    impl = _choose(a, b, impl)
    if impl == "reference":
        values = reference.pairwise_box_iou(
            a, b, a_sizes, b_sizes, kind=kind, convention=convention
        )
    elif impl == "triton":
        from fastgrpo_kernels.box_iou import pairwise_box_iou as kernel

        values = kernel(a, b, a_sizes, b_sizes, kind=kind, convention=convention)
    else:
        from fastgrpo_kernels._cpp import pairwise_box_iou as cpp

        a_start, b_start = starts(a_sizes, a.device), starts(b_sizes, a.device)
        values = cpp(a, b, a_start, b_start, offsets, sum(pairs), kind, convention)
    return values, offsets


def _choose(a: torch.Tensor, b: torch.Tensor, impl: str | None) -> str:
    chosen = select("pairwise_box_iou", a.device, impl)
    if chosen == "cpp" and torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        if impl is not None:
            raise InputError("impl: 'cpp' has no gradient, and a or b requires one")
        return "reference"
    return chosen
