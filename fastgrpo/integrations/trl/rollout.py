"""TRL's rollout by `fastgrpo.rollout.generate`: each prompt and its images prefilled once."""

from __future__ import annotations

import numpy as np
import torch

from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing import Group
from fastgrpo.packing.planner import regroup
from fastgrpo.rollout import generate

# Settings of transformers' generation that a packed rollout has, and the neutral value of others.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "min_p": (None, 0.0),
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "bad_words_ids": None,
    "force_words_ids": None,
}


def check_sampling(config) -> None:
    """`InputError` for a generation setting that a packed rollout does not have."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        allowed = neutral if isinstance(neutral, tuple) else (neutral, None)
        if value not in allowed:
            raise InputError(f"packed_rollout: {name}={value} is not supported; leave it neutral")


def sample_rows(
    model,
    prompt_ids: list[list[int]],
    fields: dict,
    num_images: list[int] | None,
    config,
    eos_token_ids: list[int],
    *,
    max_tokens: int | None,
    backend: str | None,
) -> list[list[int]]:
    """One completion per row, in row order; rows with the same prompt and images are one group.

    `prompt_ids` and `fields` are those of TRL's `_generate_single_turn`, `config` its
    GenerationConfig. A completion ends with its first end token.
    """
    check_sampling(config)
    # The processor leaves images as arrays or lists; TRL, too, makes tensors of them only here.
    family = Adapter(model).family
    images = {
        key: torch.as_tensor(np.asarray(fields[key]))
        for key in family.vision_inputs
        if fields.get(key) is not None
    }
    vision = family.split_rows(images, num_images, len(prompt_ids))
    # With a token in place of a completion, `regroup` finds the rows that share prompt and images.
    some = torch.zeros(1, dtype=torch.int64)
    rows = [
        Group(torch.tensor(ids), [some], images, sample_id=f"row {i}")
        for i, (ids, images) in enumerate(zip(prompt_ids, vision, strict=True))
    ]
    by_size: dict[int, list[list[int]]] = {}
    for part in regroup(rows):
        members = [row for row, _ in part.members]
        by_size.setdefault(len(members), []).append(members)
    completions: list[list[int]] = [[] for _ in rows]
    for size, parts in by_size.items():
        prompts = [Group(rows[m[0]].prompt_ids, [], rows[m[0]].vision) for m in parts]
        filled = generate(
            model,
            prompts,
            size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature if config.do_sample else 0.0,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
            eos_token_id=eos_token_ids,
            suppress_token_ids=config.suppress_tokens or (),
            max_tokens=max_tokens,
            backend=backend,
        )
        for members, group in zip(parts, filled, strict=True):
            for row, ids in zip(members, group.completions, strict=True):
                completions[row] = ids.tolist()
    return completions
