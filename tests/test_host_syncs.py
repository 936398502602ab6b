"""How often a pass waits for the device does not depend on how many rows it has."""

import pytest
import syncs
import torch

import fastgrpo as fg
from fastgrpo.engine import loss as engine_loss
from fastgrpo.ops.linear import head, logprob, one_pass
from fastgrpo.ops.select import ORDER
from fastgrpo.packing import group as packing_group
from fastgrpo.packing import host
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine
PER_PROMPT = 4


@pytest.fixture
def device(monkeypatch):
    """CPU tensors in a GPU's place, and the ops on the route they take there."""
    device = syncs.Device()
    for module in (host, packing_group, engine_loss):
        monkeypatch.setattr(module, "on_host", lambda x: not device.holds(x))
    for module in (head, logprob, one_pass):
        monkeypatch.setattr(module, "looks_at_each_chunk", lambda _: False)
    for op in ("linear_logprob", "linear_grpo_loss"):
        monkeypatch.setitem(ORDER[op], "cpu", ("torch",))
    return device


def rows(model, count, device):
    """`count` groups of one completion on the device, PER_PROMPT of each prompt and its image."""
    groups = tm.synthetic_groups(model, [([(4, 6)], 5, [5] * PER_PROMPT)] * (count // PER_PROMPT))
    single = []
    for group in groups:
        for c, ids in enumerate(group.completions):
            fields = {
                "vision": {name: value.clone() for name, value in group.vision.items()},
                "advantages": group.advantages[c : c + 1].clone(),
                "old_logp": [-torch.rand(5)],
                "mask": [torch.ones(5)],
            }
            one = fg.Group(group.prompt_ids.clone(), [ids.clone()], **fields)
            device.put(one.prompt_ids, *one.completions, *one.vision.values(), one.advantages)
            device.put(*one.old_logp, *one.mask)
            single.append(one)
    return single


def model_on(device):
    model = tm.tiny_model("qwen2_5_vl")
    device.put(*model.parameters(), *model.buffers())
    return model


def compared(run, model, device):
    """`run(groups)` on 8 rows and on 64: what was counted for each."""
    found = []
    for count in (8, 64):
        groups = rows(model, count, device)
        device.syncs.clear(), device.uploads.clear()
        with device.counting():
            run(groups)
        found.append((dict(device.syncs), dict(device.uploads)))
    return found


def test_score_waits_as_often_for_64_rows_as_for_8(device):
    model = model_on(device)
    few, many = compared(
        lambda groups: fg.score(model, groups, backend="dense", self_check=False), model, device
    )
    assert few == many
    assert sum(few[0].values()) < 30 and sum(few[1].values()) < 30


def test_step_waits_as_often_for_64_rows_as_for_8(device):
    model = model_on(device)
    step = fg.GRPOStep(model, fg.Objective("dapo"), backend="dense", self_check=False)
    few, many = compared(step, model, device)
    assert few == many
    assert sum(few[0].values()) < 60 and sum(few[1].values()) < 30
