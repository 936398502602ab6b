# SPDX-License-Identifier: Apache-2.0
"""A loss type is one file: two new ones, used through every op, against float64 autograd."""

import importlib.util

import pytest
import torch

import fastgrpo as fg
from fastgrpo.losses.loss_type import LOSS_TYPES
from fastgrpo.testing import models as tm

SOURCE = '''
"""Two loss types that exist in this file only."""

import torch

from fastgrpo.losses.loss_type import LEVELS, loss_type


@loss_type(
    "tanh_gate", "token-mean", levels=LEVELS, proportional=True, metric="tanh_gate/large_ratio"
)
def tanh_gate(row):
    row.metrics["tanh_gate/large_ratio"] = row.ratio.detach() > 1.1
    return -row.A * torch.tanh(row.ratio)


@loss_type("drift", "seq-mean-token-mean", couples=True)
def drift(row):
    mean = row.sequence_mean(row.k)[row.seq_ids]
    return 0.5 * mean**2 - row.A * mean
'''
LENGTHS = (5, 1, 0, 7, 3)
B, N, D, V = len(LENGTHS), sum(LENGTHS), 6, 19
SEQ = torch.repeat_interleave(torch.arange(B), torch.tensor(LENGTHS))


@pytest.fixture(autouse=True)
def defined(tmp_path):
    path = tmp_path / "new_losses.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("new_losses", path)
    known = dict(LOSS_TYPES)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        yield spec
    finally:
        LOSS_TYPES.clear()
        LOSS_TYPES.update(known)


def formula(name, logp, old, advantages, seq_ids):
    """The loss written out, every token unmasked."""
    k, counts = logp - old, torch.bincount(seq_ids, minlength=len(advantages)).clamp(min=1)
    A = advantages[seq_ids]
    if name == "tanh_gate":
        return (-A * torch.tanh(k.exp())).sum() / len(logp)
    mean = torch.zeros_like(advantages).index_add(0, seq_ids, k) / counts
    token = (0.5 * mean**2 - advantages * mean)[seq_ids]
    return (token / counts[seq_ids]).sum() / len(advantages)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    b = {"hidden": randn(N, D), "weight": randn(V, D), "advantages": randn(B)}
    b["targets"] = torch.randint(0, V, (N,), generator=g)
    z = b["hidden"] @ b["weight"].T
    b["old_logp"] = z.log_softmax(1).gather(1, b["targets"][:, None])[:, 0] + 0.3 * randn(N)
    return b


@pytest.mark.parametrize("name", ["tanh_gate", "drift"])
def test_grpo_loss_of_a_new_type(name):
    b = batch()
    logp = (b["old_logp"] + 0.2 * torch.linspace(-1, 1, N).double()).requires_grad_()
    options = {"seq_ids": SEQ, "old_logp": b["old_logp"]}
    result = fg.grpo_loss(logp, b["advantages"], fg.Objective(name), **options)
    want = formula(name, logp, b["old_logp"], b["advantages"], SEQ)
    torch.testing.assert_close(result.loss, want, rtol=1e-13, atol=0)
    grads = (torch.autograd.grad(x, logp)[0] for x in (result.loss, want))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    if name == "tanh_gate":
        large = ((logp - b["old_logp"]).exp() > 1.1).double().mean()
        assert 0 < large < 1 and result.metrics["tanh_gate/large_ratio"] == large
    assert not [k for k in result.metrics if k.startswith("clip_ratio")]


# chunks of 4 rows: a sequence of 7 is longer than a chunk
@pytest.mark.parametrize("workspace_mb", [None, 4 * V * 8 / 2**20])
@pytest.mark.parametrize("name", ["tanh_gate", "drift"])
def test_linear_grpo_loss_of_a_new_type(name, workspace_mb):
    b = batch()
    leaves = [b[k].clone().requires_grad_() for k in ("hidden", "weight")]
    options = {"seq_ids": SEQ, "old_logp": b["old_logp"], "workspace_mb": workspace_mb}
    obj = fg.Objective(name)
    result = fg.linear_grpo_loss(
        *leaves, b["targets"], b["advantages"], obj, impl="torch", **options
    )
    logp = (leaves[0] @ leaves[1].T).log_softmax(1).gather(1, b["targets"][:, None])[:, 0]
    want = formula(name, logp, b["old_logp"], b["advantages"], SEQ)
    torch.testing.assert_close(result.loss, want, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(x, leaves) for x in (result.loss, want))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["tanh_gate", "drift"])
def test_step_of_a_new_type(name):
    model = tm.tiny_model("qwen3", torch.float64)
    groups = tm.synthetic_groups(model)
    groups[0].advantages[:] = 0.0
    with tm.float64_norms():
        for group, row in zip(groups, tm.naive_logp(model, groups), strict=True):
            group.old_logp = [x.detach() + 0.1 * x.detach().cos() for x in row]
        logp = [x for row in tm.naive_logp(model, groups) for x in row]
        seq_ids = torch.repeat_interleave(torch.tensor([len(x) for x in logp]))
        old = torch.cat([x for g in groups for x in g.old_logp])
        advantages = torch.cat([g.advantages for g in groups]).double()
        want = formula(name, torch.cat(logp), old, advantages, seq_ids)
        want.backward()
        want_grads = tm.take_grads(model)
        forwards = []
        hook = model.model.register_forward_pre_hook(
            lambda *call: forwards.append(call[-1]["input_ids"].numel()), with_kwargs=True
        )
        for skip in (True, False):
            step = fg.GRPOStep(model, fg.Objective(name), skip_zero_gradient=skip, self_check=False)
            metrics = step(groups)
            error, where = tm.grad_error(tm.take_grads(model), want_grads)
            assert error <= 1e-10, where
            assert metrics["loss"] == pytest.approx(want.item(), rel=1e-10)
        hook.remove()
    # only where an advantage of 0 means no gradient are sequences left out
    assert (forwards[0] < forwards[1]) == (name == "tanh_gate")


def test_what_a_new_type_does_not_have_is_refused(defined):
    b = batch()
    with pytest.raises(fg.InputError, match="'drift' has no Triton formula"):
        fg.grpo_loss(
            b["old_logp"].float(), b["advantages"].float(), fg.Objective("drift"), seq_ids=SEQ,
            impl="triton",
        )  # fmt: skip
    with pytest.raises(fg.InputError, match="'drift' defines its own level"):
        fg.Objective("drift", importance_sampling_level="sequence")
    with pytest.raises(fg.InputError, match="delta: 'tanh_gate' has no such bound"):
        fg.Objective("tanh_gate", delta=2.0)
    with pytest.raises(fg.InputError, match="'tanh_gate' is defined already, by new_losses"):
        defined.loader.exec_module(importlib.util.module_from_spec(defined))


def test_sequence_level_of_a_new_type():
    b = batch()
    logp = b["old_logp"] + 0.2 * torch.linspace(-1, 1, N).double()
    obj = fg.Objective("tanh_gate", importance_sampling_level="sequence")
    options = {"seq_ids": SEQ, "old_logp": b["old_logp"]}
    result = fg.grpo_loss(logp, b["advantages"], obj, **options)
    counts = torch.bincount(SEQ, minlength=B).clamp(min=1)
    k = torch.zeros(B).double().index_add(0, SEQ, logp - b["old_logp"]) / counts
    want = (-b["advantages"] * torch.tanh(k.exp()))[SEQ].sum() / N
    torch.testing.assert_close(result.loss, want, rtol=1e-13, atol=0)
