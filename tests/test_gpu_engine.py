# SPDX-License-Identifier: Apache-2.0
"""Packed rows and rollouts of every family on a GPU, against the CPU in float64."""

import dataclasses
import logging
import warnings

import pytest
import torch

import fastgrpo as fg
from fastgrpo.attention import choose_backend
from fastgrpo.rollout import steps
from fastgrpo.testing import models as tm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("as_users_run")]
SPECS = (([(4, 6)], 5, [7, 3, 9, 1]), ([], 2, [4, 8]), ([(4, 4), (6, 8)], 4, [6, 30]))


def moved(groups, device="cuda", dtype=torch.float32):
    """The groups on `device`, their floating point numbers in `dtype`."""

    def move(x):
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return [
        dataclasses.replace(
            group,
            prompt_ids=move(group.prompt_ids),
            completions=[move(x) for x in group.completions],
            vision={name: move(x) for name, x in group.vision.items()},
            advantages=None if group.advantages is None else move(group.advantages),
        )
        for group in groups
    ]


def prompts_of(groups):
    return [dataclasses.replace(group, completions=[], advantages=None) for group in groups]


def in_float64(family, **config):
    """The model, groups, log-probs and gradients of one forward a sequence, on the CPU."""
    with tm.float64_norms():
        model = tm.tiny_model(family, torch.float64, **config)
        groups = tm.synthetic_groups(model, SPECS)
        logp = tm.naive_logp(model, groups)
        tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    grads = tm.take_grads(model)
    sizes = {name: 0.0 if grad is None else float(grad.abs().max()) for name, grad in grads.items()}
    # A gradient that is truly zero, as a key bias's, is rounding alone.
    told = {name: grads[name] for name, n in sizes.items() if n > 1e-12 * max(sizes.values())}
    return model, groups, [[x.detach() for x in row] for row in logp], told


def errors(model, groups, want):
    logp = [score.logp for score in fg.score(model, groups)]  # the self-check included
    tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    grads = tm.take_grads(model)
    grads = {name: grads[name].cpu().double() for name in want[1]}
    worst = max(
        float((ours.detach().cpu().double() - theirs).abs().max())
        for row, plain in zip(logp, want[0], strict=True)
        for ours, theirs in zip(row, plain, strict=True)
    )
    return worst, *tm.grad_error(grads, want[1])


@pytest.mark.parametrize("family", tm.FAMILIES)
def test_packed_rows_in_float32(family, record_property):
    model, groups, *want = in_float64(family)
    model.to("cuda", torch.float32)
    worst, gradient, where = errors(model, moved(groups), want)
    record_property("logp", worst)
    record_property("gradient", f"{gradient} {where}")
    assert worst <= 5e-5 and gradient <= 2e-4, (worst, gradient, where)


@pytest.mark.parametrize("backend", ["triton", "torch_varlen", "kvgather"])
def test_packed_rows_in_bfloat16(backend, record_property):
    """Twice the error of one forward a sequence in bfloat16 at most."""
    wide = {"text": {"hidden_size": 256, "intermediate_size": 512}}  # heads of 64
    model, groups, want, _ = in_float64("qwen2_5_vl", **wide)
    model.to("cuda", torch.bfloat16)
    groups = moved(groups, dtype=torch.bfloat16)

    def error(logp):
        pairs = [
            (a, b) for row, w in zip(logp, want, strict=True) for a, b in zip(row, w, strict=True)
        ]
        return max(float((a.cpu().double() - b).detach().abs().mean()) for a, b in pairs)

    with torch.no_grad():
        plain = error(tm.naive_logp(model, groups))
    scores = fg.score(model, groups, backend=backend)
    packed = error([score.logp for score in scores])
    sum(x.sum() for score in scores for x in score.logp).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    record_property("errors", f"{packed} {plain}")
    assert packed <= 2 * plain + 1e-3


def test_the_default_backend_is_a_kernel():
    assert choose_backend(None, torch.device("cuda"), torch.bfloat16, 128) in (
        "triton",
        "flash_attn",
        "torch_varlen",
    )


@pytest.mark.parametrize("family", tm.FAMILIES)
def test_greedy_rollouts_repeat_the_cpu(family, caplog, record_property):
    """Step by step and by graphs, in float64: no near-tie of float32 decides a token."""
    with tm.float64_norms(), caplog.at_level(logging.WARNING):
        model = tm.tiny_model(family, torch.float64)
        groups = prompts_of(tm.synthetic_groups(model, SPECS))
        options = {"max_new_tokens": 20, "temperature": 0.0, "eos_token_id": ()}
        want = fg.generate(model, groups, 2, **options)
        model.cuda()
        groups = moved(groups, dtype=torch.float64)
        for graphs in (False, True):
            got = fg.generate(model, groups, 2, cuda_graphs=graphs, **options)
            for a, b in zip(got, want, strict=True):
                assert all(map(torch.equal, [x.cpu() for x in a.completions], b.completions))
                for x, y in zip(a.rollout_logp, b.rollout_logp, strict=True):
                    torch.testing.assert_close(x.cpu(), y, rtol=0, atol=1e-5)
    record_property("graphs", "; ".join(r.message for r in caplog.records) or "recorded")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3", "llama"])
def test_decoding_steps_are_graphs(family, monkeypatch):
    """Several widths of one rollout, twice; sampled tokens and log-probs are those without."""
    monkeypatch.setattr(steps, "FIRST_WIDTH", 4)
    model = tm.tiny_model(family).cuda()
    groups = moved(prompts_of(tm.synthetic_groups(model, SPECS)))
    options = {"max_new_tokens": 30, "eos_token_id": (), "seed": 3}
    plain = fg.generate(model, groups, 4, cuda_graphs=False, **options)
    for _ in range(2):
        ours = fg.generate(model, groups, 4, **options)
        for a, b in zip(ours, plain, strict=True):
            assert all(map(torch.equal, a.completions, b.completions))
            for x, y in zip(a.rollout_logp, b.rollout_logp, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert model not in steps._not_recorded


def test_a_step_that_cannot_be_a_graph_leaves_no_trace():
    def waits():
        return torch.ones(3, device="cuda") * torch.ones(1, device="cuda").item()

    device = torch.device("cuda", 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="captur"):
            steps.record(waits, device)
        torch.manual_seed(0)
        first = torch.rand(4, device=device)
        torch.manual_seed(0)
        assert torch.equal(first, torch.rand(4, device=device))
        counter = torch.zeros(2, device=device)
        replay = steps.record(lambda counter=counter: counter.add_(1), device)
        for n in (1, 2, 3):
            assert replay().tolist() == [n, n]


def syncs_of(run):
    """How often the host waited for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.parametrize("what", ["score", "step"])
def test_the_host_waits_as_often_for_many_rows_as_for_few(what, record_property):
    model = tm.tiny_model("qwen2_5_vl").cuda()
    step = fg.GRPOStep(model, fg.Objective("dapo"), self_check=False)
    found = []
    for count in (2, 16):
        specs = [([(4, 6)], 5, [5, 6])] * count
        groups = moved(tm.synthetic_groups(model, specs))

        def run(groups=groups):
            if what == "score":
                fg.score(model, groups, self_check=False)
            else:
                step(groups)

        run()
        found.append(syncs_of(run))
    record_property("syncs", str(found))
    assert found[0] == found[1] < 60, found


def test_a_step_has_the_gradients_of_the_cpu():
    obj = fg.Objective("dapo", beta=0.04)
    results = []
    for device in ("cpu", "cuda"):
        model = tm.tiny_model("qwen2_5_vl").to(device)
        groups = moved(tm.synthetic_groups(tm.tiny_model("qwen2_5_vl"), SPECS), device)
        for group in groups:
            noise = torch.Generator().manual_seed(0)
            group.old_logp = [
                (-2 - torch.rand(n, generator=noise)).to(device) for n in group.lengths
            ]
            group.ref_logp = [x - 0.1 for x in group.old_logp]
        metrics = fg.GRPOStep(model, obj)(groups)
        grads = {n: g if g is None else g.cpu() for n, g in tm.take_grads(model).items()}
        results.append((grads, {k: float(v) for k, v in metrics.items()}))
    (want, metrics), (got, ours) = results
    error, where = tm.grad_error(got, want)
    assert error <= 3e-4, (error, where)
    for name, value in metrics.items():
        assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
