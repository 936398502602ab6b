# SPDX-License-Identifier: Apache-2.0
"""Which completions share a prompt, and which prompts share a packed row."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from fastgrpo.errors import InputError
from fastgrpo.packing.group import Group
from fastgrpo.packing.host import first_equal, host_copies

# Rows of about this many tokens keep a GPU busy; without a budget from the caller no row grows
# beyond it unless a single prompt and completion already do.
DEFAULT_TOKENS = 16384


@dataclass
class Part:
    """Some completions of one distinct prompt: `members` are (group, completion) positions."""

    group: Group
    members: list[tuple[int, int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return self.group.prompt_ids.numel() + sum(self.lengths)


def regroup(groups: Sequence[Group], skip: Set[tuple[int, int]] = frozenset()) -> list[Part]:
    """One Part per distinct prompt (same ids and same images), completions in the caller's order.

    Equality of every tensor decides. Completions in `skip` and those without a token are left out.
    """
    parts: dict[tuple, Part] = {}
    members = [
        [(g, c) for c, n in enumerate(group.lengths) if n and (g, c) not in skip]
        for g, group in enumerate(groups)
    ]
    kept = [g for g, some in enumerate(members) if some]
    prompts = host_copies([groups[g].prompt_ids for g in kept])
    images = first_equal([groups[g].vision for g in kept])
    for g, prompt, image in zip(kept, prompts, images, strict=True):
        part = parts.setdefault((prompt.numpy().tobytes(), image), Part(groups[g], [], []))
        part.members += members[g]
        part.lengths += [groups[g].completions[c].numel() for _, c in members[g]]
    return list(parts.values())


def plan_rows(parts: Sequence[Part], max_tokens: int | None = None) -> list[list[Part]]:
    """Rows of at most `max_tokens` tokens: whole prompts first, one is split only when it must be.

    First-fit decreasing, deterministic. Raises `InputError` when one prompt and completion alone
    exceed a `max_tokens` given by the caller.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    budget = DEFAULT_TOKENS if max_tokens is None else max_tokens
    pieces = [piece for part in parts for piece in _split(part, budget, max_tokens is not None)]
    rows: list[list[int]] = []
    space: list[int] = []
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i].tokens):
        need = pieces[i].tokens
        row = next((r for r, left in enumerate(space) if left >= need), None)
        if row is None:
            row = len(rows)
            rows.append([])
            space.append(budget)
        rows[row].append(i)
        space[row] -= need
    return [[pieces[i] for i in sorted(row)] for row in sorted(rows, key=min)]


def _split(part: Part, budget: int, strict: bool) -> list[Part]:
    if part.tokens <= budget:
        return [part]
    prompt = part.group.prompt_ids.numel()
    pieces: list[Part] = []
    for member, length in zip(part.members, part.lengths, strict=True):
        if strict and prompt + length > budget:
            raise InputError(
                f"{part.group.name} (group {member[0]}, completion {member[1]}): prompt of {prompt}"
                f" and completion of {length} tokens exceed max_tokens={budget}"
            )
        if not pieces or pieces[-1].tokens + length > budget:
            pieces.append(Part(part.group, [], []))
        pieces[-1].members.append(member)
        pieces[-1].lengths.append(length)
    return pieces
