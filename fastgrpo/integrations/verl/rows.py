# SPDX-License-Identifier: Apache-2.0
"""verl's rows as groups, and values of the responses' tokens back in verl's layout.

verl 0.9 keeps a batch of B sequences unpadded, as one jagged tensor of prompts and responses; what
predicts a response's token stands at the token before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.models.family import TEXT_OUTPUTS
from fastgrpo.packing import Group
from fastgrpo.packing.host import device_copies, host_copies
from fastgrpo.packing.planner import plan_rows, regroup
from fastgrpo.packing.row import positions_after

# Of `multi_modal_inputs`: lengths that only verl's flops are counted by.
COUNTED = "images_seqlens"


def read_groups(
    adapter: Adapter, data: Mapping, images: Sequence[Mapping | None] | None
) -> list[Group]:
    """One group of one completion for each row: its prompt, its response, and the mask of it.

    `data`: verl's batch with jagged `input_ids`; `prompts`, `responses` and `response_mask` jagged
    or padded (then with `attention_mask`). `images`: each row's `multi_modal_inputs`, of the prompt
    and of what a tool returned inside the response.
    """
    prompts, responses, mask = data["prompts"], data["responses"], data["response_mask"]
    given = [data["input_ids"].values(), data["input_ids"].offsets()]
    if prompts.is_nested:
        given += [prompts.offsets(), responses.offsets()]
    else:
        given += [data["attention_mask"]]
    given += [mask.values(), mask.offsets()] if mask.is_nested else [mask]
    ids, offsets, *given = host_copies(given)
    if prompts.is_nested:
        lengths = given.pop(0).diff(), given.pop(0).diff()
    else:
        attended, width = given.pop(0) != 0, prompts.shape[1]
        lengths = attended[:, :width].sum(1), attended[:, width:].sum(1)
    _check_lengths(offsets, *lengths)
    counted = given[0].split(given[1].diff().tolist()) if mask.is_nested else given[0].unbind()
    groups = []
    for row, (p, n) in enumerate(torch.stack(lengths, 1).tolist()):
        prompt, response = ids[int(offsets[row]) :][: p + n].long().split([p, n])
        vision, shown = _images(adapter, images[row] if images else None, prompt, response)
        options = {"mask": [counted[row][:n]], "sample_id": f"row {row}"}
        if shown:
            options["completion_vision"] = [shown]
        groups.append(Group(prompt, [response], vision, **options))
    return groups


def _check_lengths(offsets: Tensor, prompts: Tensor, responses: Tensor) -> None:
    wrong = (offsets.diff() != prompts + responses).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"row {row}: input_ids has {int(offsets.diff()[row])} tokens, its prompt "
            f"{int(prompts[row])} and its response {int(responses[row])}"
        )


def _images(
    adapter: Adapter, inputs: Mapping | None, prompt: Tensor, response: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A row's inputs of the tower, the prompt's and the response's, without what the processor says
    of the text, which differs between the responses to one prompt."""
    skipped = (*TEXT_OUTPUTS, COUNTED)
    vision = {k: v for k, v in (inputs or {}).items() if v is not None and k not in skipped}
    image = adapter.placeholders[:1]
    if not vision or not image or not bool((response == image[0]).any()):
        return vision, {}
    return adapter.family.at_the_prompt(vision, prompt == image[0])


def plan_micro_batches(
    groups: Sequence[Group], *, max_tokens: int | None, num_rows: int | None
) -> list[list[int]]:
    """The rows of each micro-batch, rows of equal prompts and images together.

    `max_tokens` (verl's dynamic batches): as many as a packed row of so many tokens holds, a shared
    prompt counted once; else `num_rows` each, a divisor of their number.
    """
    parts = regroup(groups)
    if max_tokens is not None:
        planned = plan_rows(parts, max_tokens)
        rows = [[g for part in row for g, _ in part.members] for row in planned]
        left = sorted(set(range(len(groups))) - {g for row in rows for g in row})
        rows[0] = rows[0] + left  # responses without a token, which have no log-prob
        return rows
    order = [g for part in parts for g, _ in part.members]
    order += sorted(set(range(len(groups))) - set(order))
    if len(order) % num_rows:
        raise InputError(
            f"micro_batch_size_per_gpu={num_rows} does not divide the {len(order)} rows of a rank"
        )
    return [order[i : i + num_rows] for i in range(0, len(order), num_rows)]


def on_jagged(like: Tensor, groups: Sequence[Group], values: Sequence[Tensor]) -> Tensor:
    """Jagged as `like`, with each response's (C,) values where its tokens are predicted, else 0."""
    ends = torch.tensor([g.prompt_ids.numel() + g.lengths[0] for g in groups]).cumsum(0)
    spans = zip(ends.tolist(), (g.lengths[0] for g in groups), strict=True)
    index = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in spans])
    (index,) = device_copies([index], like.device)
    flat = torch.zeros(int(ends[-1]), device=like.device)
    flat = flat.index_copy(0, index, torch.cat(list(values)).float())
    return torch.nested.nested_tensor_from_jagged(flat, like.offsets())


def check_positions(adapter: Adapter, groups: Sequence[Group], position_ids: Tensor) -> None:
    """`InputError` naming the first row whose position ids are not those of the packed row.

    `position_ids`: verl's, jagged (B, L) or with axes, (B, 4, L), the text's before the model's.
    """
    (given,) = host_copies([position_ids.values()])
    given = given[None] if given.ndim == 1 else given[-adapter.family.axes :]
    start = 0
    prompts: dict[tuple, Tensor] = {}
    for row, group in enumerate(groups):
        sizes = [x for _, x in sorted(group.vision.items()) if not x.is_floating_point()]
        key = tuple(x.cpu().numpy().tobytes() for x in (group.prompt_ids, *sizes))
        if key not in prompts:
            prompts[key] = adapter.prompt_positions(group.prompt_ids, group.vision)
        where = prompts[key]
        after = positions_after(adapter, group, group, 0, int(where[0, -1]))
        wanted = torch.cat([where[:, :-1], after], 1)
        came = given[:, start : start + wanted.shape[1]]
        start += wanted.shape[1]
        if not torch.equal(came.expand_as(wanted), wanted):
            at = int((came != wanted).any(0).nonzero()[0, 0])
            raise InputError(
                f"row {row}: position_ids at token {at} are {came[:, at].tolist()}, where the "
                f"model's own are {wanted[:, at].tolist()}; packed rows use the model's own"
            )
