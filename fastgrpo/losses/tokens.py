# SPDX-License-Identifier: Apache-2.0
"""The tokens of a loss and the weight of each: denominators, masks, sequences.

Letters: N tokens in a packed row, B sequences.
"""

from typing import Any, NamedTuple

import torch

IGNORE = -100  # target of a token without a loss


class Tokens(NamedTuple):
    """The inputs of the loss, every tensor (N,).

    per_sequence: the advantages are equal within each sequence by construction.
    """

    logp: torch.Tensor
    advantages: torch.Tensor
    seq_ids: torch.Tensor
    mask: torch.Tensor
    old_logp: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    rollout_logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    per_sequence: bool = True


class Scales(NamedTuple):
    """Constants that depend on masks only, so that a sum over parts of a batch is exact.

    token: (N,) weight of each token's loss in the total. entropy: 0-dim, weight of the mean
    entropy of the part, or None.
    """

    token: torch.Tensor
    entropy: torch.Tensor | None


def token_scales(
    obj: Any,
    seq_ids: torch.Tensor,
    mask: torch.Tensor,
    num_rows: int,
    num_tokens: float | torch.Tensor | None,
    num_sequences: float | torch.Tensor | None,
    dtype: torch.dtype,
) -> Scales:
    """The weights of `obj.aggregator`, 0 where masked; num_rows is B."""
    kept = mask.to(dtype)
    local = kept.sum()
    tokens = torch.as_tensor(local if num_tokens is None else num_tokens).to(kept).clamp(min=1.0)
    rows = num_rows if num_sequences is None else num_sequences
    rows = torch.as_tensor(rows).to(kept).clamp(min=1.0)
    mode = obj.aggregator
    if mode == "token-mean":
        scale = kept / tokens
    elif mode == "token-sum":
        scale = kept
    elif mode == "seq-mean-token-sum":
        scale = kept / rows
    elif mode == "seq-mean-token-sum-norm":
        scale = kept / (rows * obj.max_completion_length)
    else:
        lengths = _lengths(mask, seq_ids, num_rows).to(dtype).clamp(min=1.0)
        scale = kept / (lengths[seq_ids] * rows)
    return Scales(scale, local / tokens)


def _lengths(mask: torch.Tensor, seq_ids: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(B,) tokens of each sequence: differences of a running count, where a scattered sum would
    have all tokens of a sequence add to one address."""
    edges = torch.arange(num_rows + 1, device=seq_ids.device)
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return before[torch.searchsorted(seq_ids.contiguous(), edges)].diff()


def segment_sum(x: torch.Tensor, seq_ids: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(B,) sums of x over each sequence."""
    return x.new_zeros(num_rows).index_add(0, seq_ids, x)
