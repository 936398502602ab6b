# SPDX-License-Identifier: Apache-2.0
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


def padded(model, count, device):
    """A TRL batch on the device: left-padded prompts, right-padded completions, images in order."""
    groups = tm.synthetic_groups(
        model, [([(4, 6)], 4 + p % 3, [3, 5, 1, 4]) for p in range(count // PER_PROMPT)]
    )
    prompts = [g.prompt_ids for g in groups for _ in g.completions]
    completions = [c for g in groups for c in g.completions]
    width, columns = max(map(len, prompts)), max(map(len, completions))
    ids = torch.zeros(count, width + columns, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        place = slice(width - len(prompt), width + len(completion))
        ids[row, place], mask[row, place] = torch.cat([prompt, completion]), 1
    fields = {
        name: torch.cat([g.vision[name] for g in groups for _ in g.completions])
        for name in ("pixel_values", "image_grid_thw")
    }
    tables = {"advantages": torch.randn(count), "mask": mask[:, width:].float()}
    tables["old_logp"] = -torch.rand(count, columns)
    device.put(ids, mask, *fields.values(), *tables.values())
    return ids, mask, columns, fields, tables


def test_the_trainers_passes_wait_as_often_for_64_rows_as_for_8(device):
    pytest.importorskip("trl")
    from fastgrpo.integrations.trl import rows as trl_rows

    model = model_on(device)
    adapter, loss = fg.models.Adapter(model), engine_loss.RowLoss(fg.Objective("dapo"))
    found = []
    for count in (8, 64):
        ids, mask, columns, fields, tables = padded(model, count, device)
        device.syncs.clear(), device.uploads.clear()
        with device.counting():
            rows = trl_rows.read_rows(
                ids, mask, columns, adapter.family, fields, num_images=[1] * count
            )
            members = trl_rows.scorable(rows)
            with torch.no_grad():
                scores = fg.score(
                    model, trl_rows.as_groups(rows, members), backend="dense", self_check=False
                )
            old = trl_rows.scatter([s.logp[0] for s in scores], members, rows)
            given = trl_rows.LossTables(tables["advantages"], tables["mask"], {"old_logp": old})
            step = engine_loss.loss_of_groups(
                loss,
                adapter,
                given.groups(rows, members),
                num_tokens=given.num_tokens,
                num_sequences=count,
                backend="dense",
            )
            step.loss.backward()
        assert len(members) == count and step.loss.isfinite()
        found.append((dict(device.syncs), dict(device.uploads)))
    assert found[0] == found[1]
