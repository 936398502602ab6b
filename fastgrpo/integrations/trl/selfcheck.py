# SPDX-License-Identifier: Apache-2.0
"""The first micro-batch against TRL's own computation, before anything is learnt from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgrpo.engine.self_check import CHECKED_TOKENS, check_gradients, check_logps
from fastgrpo.integrations.trl.rows import Rows
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing import Group

CHECKED_ROWS = 4


class TRLCheck:
    """TRL's values of some rows of a padded batch.

    `trl_values` is TRL's `_get_per_token_logps_and_entropies`, `inputs` its `input_ids`,
    `attention_mask` and what each token is; `exact`: computed in float32 (see `self_check`).
    """

    def __init__(
        self,
        trl_values: Callable,
        adapter: Adapter,
        rows: Rows,
        inputs: dict[str, Tensor | None],
        exact: bool,
    ):
        self.trl_values, self.adapter, self.rows, self.exact = trl_values, adapter, rows, exact
        self.inputs = {name: value for name, value in inputs.items() if value is not None}

    def logps(self, members: list[int], packed: Tensor, counted: Tensor) -> float:
        """Compares `packed` (B, C) where `counted` (B, C), on up to four rows of `members` spread
        over the batch; the largest difference, or `SelfCheckError`."""
        chosen = members[:: max(1, -(-len(members) // CHECKED_ROWS))]
        with torch.no_grad():
            plain = self._plain(chosen, self.inputs["attention_mask"])
        what = (
            f"packed log-probabilities of rows {chosen} differ from TRL's on the first "
            "micro-batch, and nothing was trained"
        )
        kept = counted[chosen]
        return check_logps(packed[chosen][kept], plain[kept], self.exact, what)

    def gradients(self, members: list[int], score: Callable[[list[Group]], list]) -> None:
        """Compares gradients through `score` and through TRL's forward on the start of two rows."""
        chosen = sorted(members, key=lambda row: not self.rows.vision[row])[:2]
        lengths = [min(len(self.rows.completions[row]), CHECKED_TOKENS) for row in chosen]
        first = self.inputs["input_ids"].shape[1] - self.rows.num_columns
        mask = self.inputs["attention_mask"].clone()
        groups = []
        for row, length in zip(chosen, lengths, strict=True):
            mask[row, first + length :] = 0
            completion = self.rows.completions[row][:length]
            groups.append(Group(self.rows.prompts[row], [completion], self.rows.vision[row]))

        def packed() -> Tensor:
            return torch.cat([group.logp[0] for group in score(groups)])

        def plain() -> Tensor:
            values = self._plain(chosen, mask)
            return torch.cat([v[:n] for v, n in zip(values, lengths, strict=True)])

        images = any(self.rows.vision[row] for row in chosen)
        check_gradients(self.adapter, packed, plain, images=images, exact=self.exact)

    def _plain(self, chosen: list[int], attention_mask: Tensor) -> Tensor:
        """(rows, C) values of TRL's forward."""
        given = {name: value[chosen] for name, value in self.inputs.items()}
        given["attention_mask"] = attention_mask[chosen]
        vision = [self.rows.vision[row] for row in chosen]
        if any(vision):
            family = self.adapter.family
            images = [family.split_images(v) if v else [] for v in vision]
            given["num_images"] = [len(row) for row in images]
            joined = family.join_images([image for row in images for image in row])
            given |= {name: value.to(self.rows.device) for name, value in joined.items()}
        columns = self.rows.num_columns
        return self.trl_values(self.adapter.root, logits_to_keep=columns, **given)[0]
