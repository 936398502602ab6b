# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over a packed row: every route is exact, and a layer that leaves is seen."""

import sys

import pytest
import torch

import fastgrpo as fg
from fastgrpo import models, recurrence
from fastgrpo.recurrence import branches
from fastgrpo.recurrence.convolution import depthwise
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

# Prompts longer and shorter than the convolution's memory of 3 tokens, and than a chunk of 64.
SPECS = (([(4, 6)], 5, [7, 3, 1]), ([], 70, [5, 66]), ([], 2, [4, 1]), ([], 1, [3]))


@pytest.fixture(scope="module")
def case():
    with tm.float64_norms():
        model = tm.tiny_model("qwen3_5", torch.float64)
        groups = tm.synthetic_groups(model, SPECS)
        logp = tm.naive_logp(model, groups)
        tm.weighted_sum(logp, tm.random_weights(groups)).backward()
        return model, groups, logp, tm.take_grads(model)


def errors(case, **options):
    model, groups, want, want_grads = case
    with tm.float64_norms():
        scores = fg.score(model, groups, self_check=False, **options)
        logp = [s.logp for s in scores]
        tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    error = max(
        float((ours - theirs).detach().abs().max())
        for row, plain in zip(logp, want, strict=True)
        for ours, theirs in zip(row, plain, strict=True)
    )
    return error, tm.grad_error(tm.take_grads(model), want_grads)[0]


def test_chunks_are_exact(case):
    assert max(errors(case)) <= 1e-12
    assert max(errors(case, max_tokens=150)) <= 1e-12


def as_fla(rule, calls):
    """A stand-in with the contract of fla's `chunk_gated_delta_rule`: one row of sequences whose
    bounds are `cu_seqlens`, a state for each, and by default no final ones."""

    def chunk_gated_delta_rule(
        q, k, v, g=None, beta=None, *, cu_seqlens, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False,
    ):  # fmt: skip
        inputs, bounds = (q, k, v, g, beta), cu_seqlens.tolist()
        assert all(x.shape[:2] == (1, bounds[-1]) for x in inputs) and bounds[0] == 0
        assert initial_state is None or len(initial_state) == len(bounds) - 1
        calls.append(len(bounds) - 1)
        outs, states = [], []
        for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            q, k, v, g, beta = (x[:, start:end] for x in inputs)
            out, state = rule(
                q, k, v, g=g, beta=beta, output_final_state=True,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )  # fmt: skip
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states) if output_final_state else None

    return chunk_gated_delta_rule


@pytest.mark.parametrize("limit, calls", [(0, [4, 8]), (10**6, [8])])
def test_the_kernels_of_a_gpu_get_bounds(case, limit, calls, monkeypatch):
    """Two calls that hand states on, or one over whole sequences, as many as cost decides."""
    mixers, made = models.Adapter(case[0]).mixers, []
    module = sys.modules[type(mixers[0]).__module__]
    recurrence.uninstall(mixers)
    plain = module.torch_chunk_gated_delta_rule
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", as_fla(plain, made))
    monkeypatch.setattr(branches, "takes_bounds", lambda rule, on: True)
    monkeypatch.setattr(branches, "RESCAN_TOKENS", limit)
    assert max(errors(case)) <= 1e-12
    assert made == calls * len(mixers)
    recurrence.uninstall(mixers)


def test_rescan_only_where_a_kernel_serves_and_little_is_repeated():
    def seam(is_new_implementation):
        def function():
            return is_new_implementation

        return function

    layout = fg.packing.GroupLayout([(10, [3, 4]), (5, [2])])
    table = branches.Branches(layout, torch.device("cpu"))
    assert table.repeated == 25
    assert branches.has_kernel(seam(True)) and not branches.has_kernel(seam(False))
    assert not branches.has_kernel(lambda: None)
    gpu = type("OnGpu", (), {"is_cuda": True})()
    assert table.route(seam(True), gpu) == "rescan"
    assert table.route(seam(False), gpu) == "chunks"
    table.repeated = branches.RESCAN_TOKENS
    assert table.route(seam(True), gpu) == "fork"


def test_a_mixer_that_never_reaches_the_seams_raises(case, monkeypatch):
    model, groups, _, _ = case
    mixer = models.Adapter(model).mixers[0]
    monkeypatch.setattr(mixer, "forward", lambda hidden_states, **kwargs: hidden_states)
    with pytest.raises(recurrence.RecurrenceError, match="1 of 2 .* replaced their forward"):
        fg.score(model, groups, self_check=False)


def test_uninstalled_mixers_call_their_own_functions(case):
    mixers = models.Adapter(case[0]).mixers
    module = sys.modules[type(mixers[0]).__module__]
    recurrence.install(mixers)
    recurrence.install(mixers)
    original = module.causal_conv1d_fn.fastgrpo_original
    assert not hasattr(original, "fastgrpo_original")
    recurrence.uninstall(mixers)
    assert module.causal_conv1d_fn is original
    recurrence.install(mixers)


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointed_hybrid(reentrant):
    model = tm.tiny_model("qwen3_5").train()
    groups = tm.synthetic_groups(model, SPECS)
    logp = tm.naive_logp(model, groups)
    tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    want = logp, tm.take_grads(model)
    tm.checkpoint_activations(model, reentrant=reentrant)
    model.enable_input_require_grads()
    ours = [s.logp for s in fg.score(model, groups)]
    tm.weighted_sum(ours, tm.random_weights(groups)).backward()
    assert tm.grad_error(tm.take_grads(model), want[1])[0] <= 2e-5


@pytest.mark.parametrize("tokens, channels, taps", [(9, 5, 4), (4, 1, 4), (7, 3, 1)])
def test_depthwise_is_the_convolution(tokens, channels, taps):
    generator = torch.Generator().manual_seed(0)
    row, weight, dout = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((tokens, channels), (channels, taps), (tokens - taps + 1, channels))
    )
    want = torch.nn.functional.conv1d(row.T[None], weight[:, None], groups=channels)[0].T
    got = depthwise(row, weight)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(x, (row, weight), dout) for x in (got, want))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
