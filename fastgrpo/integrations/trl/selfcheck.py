"""The first micro-batch against TRL's own computation, before anything is learnt from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgrpo.integrations.trl.rows import Rows
from fastgrpo.models.family import Family

# In float32 the two differ by the order of additions. In half precision TRL rounds each logit, so
# single tokens differ by up to 0.1; a structural mistake (positions, leakage) moves the mean.
FLOAT32_TOLERANCE = 1e-3
HALF_MEAN_TOLERANCE = 0.05
CHECKED_ROWS = 4


def check_against_trl(
    trl_values: Callable,
    model: nn.Module,
    family: Family,
    rows: Rows,
    members: list[int],
    logps: Tensor,
    inputs: dict[str, Tensor | None],
    counted: Tensor,
    *,
    half_precision: bool,
) -> float:
    """Compares `logps` (B, C) with `trl_values` on up to four rows spread over the micro-batch.

    `members` are the rows to choose from, `inputs` TRL's `input_ids`, `attention_mask` and
    `mm_token_type_ids`, `counted` (B, C) the tokens to compare. Returns the largest absolute
    difference; raises `RuntimeError` when it cannot be rounding.
    """
    chosen = members[:: max(1, -(-len(members) // CHECKED_ROWS))]
    sliced = {name: value[chosen] for name, value in inputs.items() if value is not None}
    vision = [rows.vision[row] for row in chosen]
    if any(vision):
        images = [family.split_images(v) if v else [] for v in vision]
        sliced["num_images"] = [len(row) for row in images]
        sliced |= family.join_images([image for row in images for image in row])
    with torch.no_grad():
        expected, _, _ = trl_values(model, logits_to_keep=rows.num_columns, **sliced)
    error = (logps.detach()[chosen] - expected.float()).abs()[counted[chosen]]
    largest, mean = float(error.max()), float(error.mean())
    worst = mean if half_precision else largest
    if not worst <= (HALF_MEAN_TOLERANCE if half_precision else FLOAT32_TOLERANCE):
        raise RuntimeError(
            "packed log-probabilities differ from TRL's on the first micro-batch: max "
            f"{largest:.3g}, mean {mean:.3g} over {error.numel()} tokens of rows {chosen}. "
            "Nothing was trained. Please report this model; self_check=False skips the check."
        )
    return largest
