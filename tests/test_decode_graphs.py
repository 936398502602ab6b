# SPDX-License-Identifier: Apache-2.0
"""Decoding steps that a CUDA graph can repeat, on the CPU: a stand-in runs them again instead."""

import logging
import sys

import pytest
import torch

from fastgrpo.rollout import generate, steps
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine
SPECS = (([(4, 6)], 5, []), ([], 11, []), ([(4, 4), (6, 10)], 4, []))


@pytest.fixture
def recorded(monkeypatch):
    """Each step reads and writes the memory of the one before, as a graph's; the widths that were
    recorded."""
    widths = []

    def record(step, device):
        out = []
        widths.append(step.__self__.state.width)

        def replay():
            logits = step()
            out.append(logits.clone())
            return out[0].copy_(logits)

        return replay

    monkeypatch.setattr(steps, "record", record)
    monkeypatch.setattr(steps, "FIRST_WIDTH", 2)
    monkeypatch.setattr(sys.modules["fastgrpo.rollout.generate"], "replays", lambda *_: True)
    return widths


def prompts(model):
    return tm.synthetic_groups(model, SPECS)


@pytest.mark.parametrize("family", tm.FAMILIES)
def test_steps_of_one_shape_sample_what_growing_ones_do(family, recorded):
    with tm.float64_norms():
        model = tm.tiny_model(family, torch.float64)
        options = {"max_new_tokens": 9, "seed": 0, "eos_token_id": ()}
        plain = generate(model, prompts(model), 3, cuda_graphs=False, **options)
        assert not recorded
        fixed = generate(model, prompts(model), 3, **options)
    assert recorded == [2, 4, 8]  # eight steps follow the prompts'
    for a, b in zip(plain, fixed, strict=True):
        assert all(map(torch.equal, a.completions, b.completions))
        for x, y in zip(a.rollout_logp, b.rollout_logp, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)  # log-probs are kept in float32


def test_a_window_shorter_than_the_rollout(recorded):
    model = tm.tiny_model("gemma3_text", text={"sliding_window": 3})
    options = {"max_new_tokens": 12, "temperature": 0.0, "eos_token_id": ()}
    plain = generate(model, prompts(model), 2, cuda_graphs=False, **options)
    fixed = generate(model, prompts(model), 2, **options)
    for a, b in zip(plain, fixed, strict=True):
        assert all(map(torch.equal, a.completions, b.completions))


def test_a_forward_that_cannot_be_recorded_decodes_kernel_by_kernel(recorded, monkeypatch, caplog):
    model = tm.tiny_model("qwen3_5")
    options = {"max_new_tokens": 9, "seed": 0, "eos_token_id": ()}
    plain = generate(model, prompts(model), 2, cuda_graphs=False, **options)

    def refuse(step, device):
        step.__self__.state.calls += 1  # the forward had come so far
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(steps, "record", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fixed = generate(model, prompts(model), 2, **options)
            for a, b in zip(plain, fixed, strict=True):
                assert all(map(torch.equal, a.completions, b.completions))
    (message,) = (r.message for r in caplog.records if r.name == steps.logger.name)
    assert message.endswith("operation not permitted when stream is capturing")
    assert model in steps._not_recorded


def test_no_graph_on_a_cpu():
    model = tm.tiny_model("qwen3")
    adapter = steps.Adapter(model)
    assert not steps.replays(adapter, 1000)
