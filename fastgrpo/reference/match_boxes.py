# SPDX-License-Identifier: Apache-2.0
"""One-to-one matching of rows with columns from a score per pair, one sample at a time.

Optimal assignment is scipy's; the greedy methods are loops.
"""

import torch

METHODS = ("optimal", "greedy", "greedy_rows")
SCORE_LIMIT = 1e100  # beyond it sums of scores lose all meaning


def match_boxes(
    scores: torch.Tensor,
    a_sizes: list[int],
    b_sizes: list[int],
    *,
    method: str,
    threshold: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """(sum a_i * b_i,) scores -> (sum a_i,) int64 columns, -1 where the row stays alone."""
    match_one = {"optimal": _optimal, "greedy": _greedy, "greedy_rows": _greedy_rows}[method]
    scores = scores.double()
    allowed = allowed_pairs(scores, threshold, mask)
    columns, start = [], 0
    for rows, cols in zip(a_sizes, b_sizes, strict=True):
        block = slice(start, start + rows * cols)
        columns.append(
            match_one(scores[block].view(rows, cols), allowed[block].view(rows, cols))
            if rows and cols
            else torch.full((rows,), -1, device=scores.device)
        )
        start = block.stop
    return torch.cat(columns) if columns else scores.new_empty(0, dtype=torch.int64)


def allowed_pairs(
    scores: torch.Tensor, threshold: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """The pairs that may be matched: a finite score, at least the threshold, not masked out."""
    allowed = scores.abs() <= SCORE_LIMIT  # False for NaN and inf
    if threshold is not None:
        allowed = allowed & (scores >= threshold)
    return allowed if mask is None else allowed & mask


def _optimal(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """As many allowed pairs as can be matched together, and of these matchings the largest sum."""
    from scipy.optimize import linear_sum_assignment

    matched = torch.full((scores.shape[0],), -1, device=scores.device)
    if not allowed.any():
        return matched
    cost = -scores.masked_fill(~allowed, 0.0)
    low, high = cost[allowed].min(), cost[allowed].max()
    # One forbidden pair costs more than any choice among the allowed ones can save.
    forbidden = high + (min(scores.shape) + 1) * (high - low) + 1
    cost = torch.where(allowed, cost, forbidden)
    rows, cols = map(torch.as_tensor, linear_sum_assignment(cost.cpu().numpy()))
    rows, cols = rows.to(scores.device), cols.to(scores.device)
    matched[rows] = torch.where(allowed[rows, cols], cols, -1)
    return matched


def _greedy(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Repeatedly the best remaining pair; of equal ones the lowest row, then the lowest column."""
    left = torch.where(allowed, scores, -torch.inf)
    matched = torch.full((scores.shape[0],), -1, device=scores.device)
    for _ in range(min(scores.shape)):
        best = left.flatten().argmax()
        row, col = best // scores.shape[1], best % scores.shape[1]
        if left[row, col] == -torch.inf:
            break
        matched[row] = col
        left[row], left[:, col] = -torch.inf, -torch.inf
    return matched


def _greedy_rows(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Each row in order takes the best column left; of equal ones the lowest."""
    left = torch.where(allowed, scores, -torch.inf)
    matched = torch.full((scores.shape[0],), -1, device=scores.device)
    for row in range(scores.shape[0]):
        col = left[row].argmax()
        if left[row, col] > -torch.inf:
            matched[row] = col
            left[:, col] = -torch.inf
    return matched
