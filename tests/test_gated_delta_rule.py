# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in chunks equals the one token after another, forward and backward."""

import numpy as np
import pytest
import torch

from fastgrpo.packing.layout import GroupLayout
from fastgrpo.recurrence.gated_delta_rule import CHUNK, Chunks, gated_delta_rule
from fastgrpo.reference import gated_delta_rule as definition
from fastgrpo.testing import assert_within_budget

# Prompts and completions below, at, just above and far above a chunk, of one token, and no
# completion with a token at all.
LENGTHS = [(70, [5, 66, 1]), (64, [64, 65]), (1, [1, 0, 130]), (3, [0]), (200, [])]
NAMES = ("q", "k", "v", "g", "beta")


def given(dtype=torch.float64, heads=(2, 4), sizes=(8, 12), decay=0.3, seed=0):
    """q, k, v, g and beta of a packed row; keys of length 1, as the mixers make them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(p + sum(cs) for p, cs in LENGTHS)

    def noise(*shape):
        return torch.randn(tokens, *shape, generator=generator, dtype=torch.float64)

    (few, many), (width, value) = heads, sizes
    q, k = (torch.nn.functional.normalize(noise(few, width), dim=-1) for _ in range(2))
    inputs = q, k, noise(many, value), -decay * noise(many).abs(), noise(many).sigmoid()
    return [x.to(dtype).requires_grad_() for x in inputs]


def by_sequence(rule, inputs, segments):
    """Outputs and the prompts' states of rule(q, k, v, g, beta, state), one after another."""
    out, states = [], {}
    for start, end, prefix, prefix_end in segments.tolist():
        state = states.get(prefix) if prefix < prefix_end else None
        part = [x[start:end] for x in inputs]
        if end > start:
            got, state = rule(*part, state)
            out.append(got)
        if prefix == prefix_end:
            states[start] = state
    return torch.cat(out), torch.stack(list(states.values()))


def by_definition(inputs, segments):
    return by_sequence(definition.gated_delta_rule, inputs, segments)


def results(run, inputs, segments):
    """Outputs, states, and the gradients of weighted sums of both."""
    out, states = run(inputs, segments)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in (out, states)
    )
    grads = torch.autograd.grad(total, inputs)
    return dict(zip(("out", "states", *NAMES), (out, states, *grads), strict=True))


def in_chunks(size):
    def run(inputs, segments):
        return gated_delta_rule(*inputs, Chunks(segments, torch.device("cpu"), size))

    return run


def segments_of(lengths=LENGTHS):
    return np.array(GroupLayout(lengths).segments)


@pytest.mark.parametrize("size", (1, 7, 32, 64))
@pytest.mark.parametrize("heads", ((2, 4), (3, 3)))
def test_chunks_equal_the_definition(size, heads):
    inputs, segments = given(heads=heads), segments_of()
    want, got = (results(run, inputs, segments) for run in (by_definition, in_chunks(size)))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=name)


def test_a_fast_decay_neither_overflows_nor_divides_by_zero():
    """exp of a chunk's whole decay is 0 here; its inverse would be inf."""
    inputs, segments = given(decay=60.0), segments_of()
    want, got = (results(run, inputs, segments) for run in (by_definition, in_chunks(CHUNK)))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=name)


def test_nothing_learnt_where_nothing_is_written():
    """beta 0 and g 0 leave states as they are; their own gradients are exact all the same."""
    q, k, v, g, beta = given()
    inputs = [q, k, v, *((x.detach() * 0).requires_grad_() for x in (g, beta))]
    segments = segments_of()
    want, got = (results(run, inputs, segments) for run in (by_definition, in_chunks(CHUNK)))
    assert not got["out"].any() and not got["v"].any()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=name)


def stock(inputs, segments):
    """transformers' own chunks, sequence by sequence; keys come normalised, queries unscaled."""
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")

    def rule(q, k, v, g, beta, state):
        share = v.shape[1] // k.shape[1]
        q, k = (x.repeat_interleave(share, 1) for x in (q * q.shape[-1] ** 0.5, k))
        out, state = modeling.torch_chunk_gated_delta_rule(
            *(x[None] for x in (q, k, v)), g=g[None], beta=beta[None], output_final_state=True,
            initial_state=None if state is None else state[None],
        )  # fmt: skip
        return out[0], state[0]

    return by_sequence(rule, inputs, segments)


def test_float32_is_as_exact_as_transformers_fallback():
    segments, wide = segments_of(), given()
    narrow = [x.detach().float().requires_grad_() for x in wide]
    want = results(by_definition, wide, segments)
    same = results(stock, narrow, segments)
    got = results(in_chunks(CHUNK), narrow, segments)
    for name in want:
        assert_within_budget(got[name], want[name], same[name], what=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autocast_changes_nothing(dtype):
    """Forward inside and backward outside, as trainers do."""
    segments = segments_of()
    inputs = [x.detach().to(dtype).float().requires_grad_() for x in given()]
    want = results(in_chunks(CHUNK), inputs, segments)
    run = in_chunks(CHUNK)

    def inside(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return run(*args)

    got = results(inside, inputs, segments)
    assert all(torch.equal(got[name], want[name]) for name in want)
