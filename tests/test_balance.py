# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of packed rows against the stock loss of the padded batch."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import fastgrpo as fg
from fastgrpo import models
from fastgrpo.engine import RouterBalance
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

MIXTURES = [name for name in tm.FAMILIES if "moe" in name or name == "qwen3_next"]
SPECS = (([(4, 6)], 5, [7, 3, 1]), ([(4, 4)], 3, [5]), ([(4, 4), (6, 4)], 1, [4, 2]))


def stock_loss(model, groups):
    """transformers' own, over every completion behind its prompt, padding masked out."""
    rows = [torch.cat([g.prompt_ids, c]) for g in groups for c in g.completions]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    family, repeated = models.families()[model.config.model_type], []
    for group in groups:
        if group.vision:
            repeated += family.split_images(group.vision) * len(group.completions)
    vision = family.join_images(repeated) if repeated else {}
    given = family.stock_inputs(model.config, ids, vision)
    return model(
        input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False, **given
    ).aux_loss


@pytest.mark.parametrize("max_tokens", (None, 45))
@pytest.mark.parametrize("family", MIXTURES)
def test_equals_the_loss_of_unshared_prompts(family, max_tokens):
    with tm.float64_norms():
        model = tm.tiny_model(family, torch.float64)
        groups = tm.synthetic_groups(model, SPECS)
        want = stock_loss(model, groups)
        want.backward()
        want_grads = tm.take_grads(model)
        balance = RouterBalance(models.Adapter(model))
        fg.score(model, groups, self_check=False, max_tokens=max_tokens, balance=balance)
        loss = balance.loss()
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        loss.backward()
        assert tm.grad_error(tm.take_grads(model), want_grads)[0] <= 1e-12


def test_a_dense_model_has_nothing_to_balance():
    with pytest.raises(fg.InputError, match="'qwen3' has no routers"):
        RouterBalance(models.Adapter(tm.tiny_model("qwen3")))


def test_counting_a_prompt_once_is_another_loss(monkeypatch):
    model = tm.tiny_model("qwen3_moe")
    groups = tm.synthetic_groups(model, SPECS)
    want = stock_loss(model, groups)
    single = [fg.Group(g.prompt_ids, g.completions[:1]) for g in groups]
    balance = RouterBalance(models.Adapter(model))
    fg.score(model, single, balance=balance)
    assert abs(float((balance.loss() - want).detach())) > 1e-4
