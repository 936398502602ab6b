# SPDX-License-Identifier: Apache-2.0
"""The comparison with one-by-one forwards sees each way to get a family's packed row wrong."""

import faults
import pytest
import torch

import fastgrpo as fg
from fastgrpo import models
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

# A prompt with an image longer than a tiny window, and two whose completions must not meet.
SPECS = (([(4, 6)], 14, [7, 3, 1]), ([], 5, [5, 6]), ([], 2, [4]))
CORE = ("gemma3", "mistral", "qwen3_5", "qwen3_vl")
EVERYWHERE = (faults.one_causal_row, faults.positions_go_on)
RECURRENT = (
    faults.state_zeroed,
    faults.state_gradient_cut,
    faults.convolution_leaks,
    faults.rule_leaks,
)
IN_GRADIENTS_ALONE = (faults.state_gradient_cut,)


def possible(family):
    """The faults a family can have."""
    config = tm.tiny_config(family)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    found = list(EVERYWHERE)
    if "linear_attention" in kinds:
        found += RECURRENT
    if "sliding_attention" in kinds or family == "mistral":
        found.append(faults.window_forgotten)
    if models.families()[family].two_way(config):
        found.append(faults.blocks_forgotten)
    return found


CASES = [
    pytest.param(
        family, fault, id=f"{family}-{fault.__name__}",
        marks=() if family in CORE else pytest.mark.slow,
    )
    for family in tm.FAMILIES
    for fault in possible(family)
]  # fmt: skip


@pytest.fixture(scope="module")
def case(request):
    """Of one family after another: model, groups, log-probs and gradients one by one."""
    kept = {}

    def of(family):
        if family not in kept:
            kept.clear()
            model = tm.tiny_model(family)
            groups = tm.synthetic_groups(model, SPECS)
            logp = tm.naive_logp(model, groups)
            tm.weighted_sum(logp, tm.random_weights(groups)).backward()
            kept[family] = model, groups, logp, tm.take_grads(model)
        return kept[family]

    return of


def errors(model, groups, want, want_grads):
    """The largest error of a log-prob, and of a gradient relative to its parameter's largest."""
    logp = [s.logp for s in fg.score(model, groups, self_check=False, backend="dense")]
    tm.weighted_sum(logp, tm.random_weights(groups)).backward()
    pairs = [
        (ours, theirs)
        for row, plain in zip(logp, want, strict=True)
        for ours, theirs in zip(row, plain, strict=True)
    ]
    worst = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return worst, tm.grad_error(tm.take_grads(model), want_grads)[0]


@pytest.mark.parametrize("family, fault", CASES)
def test_the_fault_shows(case, family, fault, monkeypatch):
    given = case(family)
    error, grad_error = errors(*given)
    assert error <= 2e-5 and grad_error <= 2e-4
    fault(monkeypatch)
    error, grad_error = errors(*given)
    assert grad_error > 1e-2
    assert (error > 1e-3) != (fault in IN_GRADIENTS_ALONE)


ORDERED = [
    pytest.param(family, marks=() if family in CORE else pytest.mark.slow) for family in tm.FAMILIES
]


@pytest.mark.parametrize("family", ORDERED)
def test_order_changes_nothing(case, family):
    """Groups and completions the other way round: the same log-probs."""
    model, groups, want, _ = case(family)
    turned = [
        fg.Group(group.prompt_ids, group.completions[::-1], group.vision)
        for group in reversed(groups)
    ]
    with torch.no_grad():
        got = [s.logp[::-1] for s in fg.score(model, turned, self_check=False)][::-1]
    for row, plain in zip(got, want, strict=True):
        for ours, theirs in zip(row, plain, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=2e-5, rtol=0)
