# SPDX-License-Identifier: Apache-2.0
"""generate: sample completions in the training process, each prompt and image prefilled once.

Letters: P prompts, G completions per prompt, B = P G rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.engine.continuation import KeptPrompts
from fastgrpo.engine.next_token import prompt_passes
from fastgrpo.errors import InputError
from fastgrpo.models.adapter import Adapter
from fastgrpo.packing.group import Group
from fastgrpo.packing.vision import KeptFeatures
from fastgrpo.rollout.progress import Progress, stop_criterion
from fastgrpo.rollout.sampling import Sampling
from fastgrpo.rollout.state import DecodeState, FixedDecodeState, Prefill
from fastgrpo.rollout.steps import ReplayedSteps, Steps, replays


@torch.no_grad()
def generate(
    model: nn.Module,
    groups: Sequence[Group],
    num_generations: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    suppress_token_ids: Sequence[int] = (),
    seed: int | None = None,
    max_tokens: int | None = None,
    backend: str | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    features: KeptFeatures | None = None,
    keep: KeptPrompts | None = None,
    cuda_graphs: bool = True,
) -> list[Group]:
    """Sample `num_generations` completions of every group's prompt with the model as it is now.

    The distribution is that of `model.generate(do_sample=True)` with the same settings (and every
    other setting neutral), which are applied as `Sampling` says; temperature 0 is greedy. A prompt
    and its images are encoded once, and each decoding step reads the prompt's keys once for its G
    rows. Image and video placeholders are always suppressed: a sampled one has no image.

    Returns new groups with `completions` (G tensors (C_i,), at most `max_new_tokens`, the end token
    or the one that completes a stop string included) and `rollout_logp`, the log-probs that `score`
    gives at this temperature (at temperature 1 for a greedy rollout); all other fields of the given
    groups stay, `advantages` and other per-completion fields are dropped.

    `eos_token_id`: one id or several; None takes the model's generation config. `stop_strings` need
    the `tokenizer`. `seed` makes the result repeatable; None draws from the default generator.
    `max_tokens`: the most prompt tokens encoded in one row. `features`: as in `score`. `keep`
    takes what the model computed of the prompts, with gradient and in the mode it is in, for
    `loss_of_groups`. `cuda_graphs`: on a GPU, the decoding steps are CUDA graphs where the model's
    forward can be one and its weights are whole. The model's train mode is restored afterwards.
    Raises `InputError`.
    """
    _check_call(groups, num_generations, max_new_tokens)
    if not groups:
        return []
    adapter = Adapter(model)
    ends = torch.tensor(_end_ids(adapter, eos_token_id), dtype=torch.int64, device=adapter.device)
    banned = torch.tensor([*suppress_token_ids, *adapter.placeholders], dtype=torch.int64)
    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        banned.to(adapter.device),
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        min_new_tokens=min_new_tokens,
        ends=ends,
    )
    criterion = stop_criterion(stop_strings, tokenizer)
    generator = None
    if seed is not None:
        generator = torch.Generator(adapter.device).manual_seed(seed)
    options = {"max_tokens": max_tokens, "backend": backend, "features": features}
    with _evaluating(model) if keep is None else contextlib.nullcontext():
        prompts, logits, position = _prefill(adapter, groups, num_generations, keep=keep, **options)
    rows = (*prompts, num_generations, max_new_tokens)
    steps: Steps
    if cuda_graphs and replays(adapter, max_new_tokens):
        steps = ReplayedSteps(adapter, FixedDecodeState(*rows), position)
    else:
        steps = Steps(adapter, DecodeState(*rows), position)
    with _evaluating(model):
        progress = Progress(
            [group.prompt_ids for group in groups],
            num_generations,
            ends,
            criterion=criterion,
            vocabulary=logits.shape[1] if sampling.penalizes else None,
        )
        tokens, logps = _decode(steps, max_new_tokens, logits, sampling, progress, generator)
    return _filled(groups, num_generations, tokens, logps, progress.lengths.tolist())


def _check_call(groups: Sequence[Group], num_generations: int, max_new_tokens: int) -> None:
    if num_generations < 1 or max_new_tokens < 1:
        raise InputError(
            f"num_generations and max_new_tokens must be at least 1, got {num_generations} and "
            f"{max_new_tokens}"
        )
    for group in groups:
        if group.completions:
            raise InputError(f"{group.name}: has completions already; generate fills empty groups")


def _prefill(adapter, groups, num_generations, *, keep: KeptPrompts | None, **options):
    """Keys and values of the prompts and their states; (B, V) logits of the first token, (B,) its
    position."""
    prefixes: list = [None] * len(groups)
    states: list = [None] * len(groups)
    logits: list = [None] * len(groups)
    position = torch.empty(len(groups), dtype=torch.int64)
    recorders: list[Prefill] = []

    def record(layout) -> Prefill:
        recorders.append(Prefill(layout))
        return recorders[-1]

    options |= {"observe": record, "keep": keep, "copies": num_generations}
    for step in prompt_passes(adapter, groups, **options):
        sizes = [groups[i].prompt_ids.numel() for i in step.members]
        recorded = recorders.pop()
        recorded.recording = False
        with torch.set_grad_enabled(keep is not None):
            layers = [(k.split(sizes), v.split(sizes)) for k, v in recorded.layers]
            lasts = step.hidden.unbind()
        # a module that attends twice in a forward would not know which of its keys are asked for
        kept = keep is not None and len(set(recorded.modules)) == len(recorded.modules)
        if kept:
            keep.spare += step.spare
        for n, i in enumerate(step.members):
            prefixes[i] = [(k[n], v[n]) for k, v in layers]
            if kept:
                own = dict(zip(recorded.modules, prefixes[i], strict=True))
                keep.put(groups[i], own, lasts[n])
            states[i] = recorded.states_of(n)
            logits[i] = step.logits[n]
            position[i] = step.row.following[n]
    rows = torch.stack(logits).repeat_interleave(num_generations, 0)
    position = position.repeat_interleave(num_generations).to(adapter.device)
    return (prefixes, states), rows, position


def _decode(steps, count, logits, sampling, progress, generator):
    """(B, count) sampled ids and their log-probs; a row's entries after its end mean nothing."""
    tokens, logps = [], []
    for n in range(count):
        token, logp = sampling.draw(logits, generator, progress.seen, n)
        tokens.append(token)
        logps.append(logp)
        if not progress.add(token) or n + 1 == count:
            break
        logits = steps(token)
    return torch.stack(tokens, 1), torch.stack(logps, 1)


def _end_ids(adapter: Adapter, eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        config = getattr(adapter.core, "generation_config", None)
        eos_token_id = getattr(config, "eos_token_id", None)
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _filled(groups, num_generations: int, tokens: Tensor, logps: Tensor, lengths: list[int]):
    """The groups with their completions, each cut to its length."""
    filled = []
    for i, group in enumerate(groups):
        rows = range(i * num_generations, (i + 1) * num_generations)
        device = group.prompt_ids.device
        filled.append(
            dataclasses.replace(
                group,
                completions=[tokens[r, : lengths[r]].to(device) for r in rows],
                rollout_logp=[logps[r, : lengths[r]].to(device) for r in rows],
                advantages=None,
                old_logp=None,
                ref_logp=None,
                mask=None,
                completion_vision=None,
            )
        )
    return filled


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the rollout: no dropout, no gradient checkpointing; each module restored."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
