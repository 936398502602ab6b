"""One forward of a packed row through the model the caller trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastgrpo.attention.kvgather import GatherRows
from fastgrpo.models.head import effective_head, replaced_head, under_autocast
from fastgrpo.packing.row import PackedRow


def forward_row(adapter, row: PackedRow, head: Callable[..., Tensor]) -> Tensor:
    """Run the model on `row`; returns head(hidden (N, D), weight (V, D), bias) as a tensor.

    `head` is called where the model calls its lm_head, inside the root's forward, and its result
    leaves through the model's output, so that the hooks of FSDP and ZeRO see both.
    """

    def project(hidden: Tensor) -> Tensor:
        # (1, U, D) distinct predicting rows -> (N, D): the prompt's last row serves G completions
        hidden = GatherRows.apply(hidden[0], row.layout.pred_index)
        return head(*under_autocast(hidden, *effective_head(adapter.head)))[None]

    with replaced_head(adapter.head, project):
        output = adapter.root(**row.inputs)
    logits = output.logits if hasattr(output, "logits") else output[0]
    return logits[0]
