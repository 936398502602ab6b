# SPDX-License-Identifier: Apache-2.0
"""What a streaming pass over a chunk of logits returns, whichever implementation made it.

Letters: C rows of a chunk, V vocabulary (of this shard).
"""

from typing import NamedTuple

import torch

# V * exp(76) stays below the largest float32 for V up to 3.4e5, so a row below the limit has
# finite sums and finite products.
MAX_EXPONENT = 76.0


class OffsetExp(NamedTuple):
    """Exponentials about the target logit; E itself is left in the logits' memory.

    exps: (C, V) the view that holds E (`logits`, or its bfloat16 view of row stride 2V).
    sum_exp: (C,) S = sum over j != y of E_j.
    target_logit: (C,) the transformed target logit before the temperature, f(z_y).
    moment: (C,) sum over j != y of E_j d_j with d_j = ln E_j (0 ln 0 = 0), or None.
    overflow: (C,) bool, True where an exponent passed MAX_EXPONENT or the target logit is not
        finite. E, S and moment of such a row are unspecified: the caller recomputes the row.
    """

    exps: torch.Tensor
    sum_exp: torch.Tensor
    target_logit: torch.Tensor
    moment: torch.Tensor | None
    overflow: torch.Tensor
