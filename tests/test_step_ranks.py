# SPDX-License-Identifier: Apache-2.0
"""GRPOStep on two FSDP2 ranks with unequal work: one has images and more rows, the other none."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from two_ranks import run_two_ranks

import fastgrpo as fg
from fastgrpo.models import families
from fastgrpo.testing import models as tm


def test_a_rank_without_images_runs_an_idle_tower(monkeypatch):
    """What ranks do, in one process: same log-probs, and every parameter that images of another
    rank reach gets a zero gradient. Layers that no image reaches (LLaVA's after the one it reads,
    Gemma 3's pooling head) have none on any rank."""
    for family in tm.VLM_FAMILIES:
        model = tm.tiny_model(family)
        groups = tm.synthetic_groups(model, [((), 5, (3, 2))])
        weights = tm.random_weights(groups)
        tm.weighted_sum(tm.naive_logp(model, groups), weights).backward()
        want = tm.take_grads(model)
        pictured = tm.synthetic_groups(model, [([(4, 6)], 5, (3, 2))])
        tm.weighted_sum(tm.naive_logp(model, pictured), weights).backward()
        reached = {n for n, g in tm.take_grads(model).items() if g is not None}
        with monkeypatch.context() as patch:
            patch.setattr("fastgrpo.engine.forward.distributed", lambda: True)
            module = importlib.import_module("fastgrpo.engine.score")
            patch.setattr(module, "extra_forwards", lambda adapter, rows: 2)
            got = [s.logp for s in fg.score(model, groups)]
        assert "get_image_features" not in vars(model.model)
        tm.weighted_sum(got, weights).backward()
        grads = tm.take_grads(model)
        inside = {id(p) for p in families()[family].tower(model).parameters()}
        tower = {n for n, p in model.named_parameters() if id(p) in inside}
        assert tower & reached
        assert not [n for n in reached if grads[n] is None], family
        assert not [n for n in tower & reached if grads[n].any()], family
        assert tm.grad_error(grads, want)[0] <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl", "qwen3_5"))
def test_two_ranks_with_unequal_work(tmp_path, family):
    run_two_ranks(__file__, tmp_path / "store", family)


def worker(store: str, family: str, rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    dist = torch.distributed
    torch.set_num_threads(1)
    model = tm.tiny_model(family)
    groups = tm.synthetic_groups(model)
    obj = fg.Objective(loss_type="grpo")
    fg.GRPOStep(model, obj)(groups)
    want = tm.take_grads(model)

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    for block in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(block)
    fully_shard(model)
    mine = groups[3:] if rank else groups[:3]  # the last group is text only
    step = fg.GRPOStep(model, obj, max_tokens=41)
    lengths = [g.lengths for g in mine]
    totals = torch.tensor([sum(map(sum, lengths)), sum(map(len, lengths))])
    dist.all_reduce(totals)
    # FSDP averages over the ranks; the step's loss is their sum.
    step(mine, num_tokens=totals[0], num_sequences=totals[1], weight=dist.get_world_size())
    got = {n: g.full_tensor() for n, g in tm.take_grads(model).items()}
    error, where = tm.grad_error(got, want)
    dist.destroy_process_group()
    assert error <= 2e-5, (where, error)


if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]))
