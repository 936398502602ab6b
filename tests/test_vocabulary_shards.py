# SPDX-License-Identifier: Apache-2.0
"""linear_logprob and linear_grpo_loss with the vocabulary split over two gloo processes."""

import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from two_ranks import run_two_ranks

import fastgrpo as fg
from fastgrpo.testing import relative_error

N, D, V, CUT = 12, 8, 29, 13  # shards of 13 and 16 rows


def _inputs():
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    h, w, b = randn(N, D), randn(V, D), randn(V)
    y = torch.randint(0, V, (N,), generator=g)
    y[3] = -100
    h[5] *= 300.0  # exponents beyond the limit: the safe path has to agree over ranks
    return h, w, b, y, randn(3), torch.arange(N) // 4


def _calls(h, w, b, y, A, ids, group):
    """Gradients of both ops, for every plan and with entropy, softcap and temperature."""
    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    results = []
    for workspace, softcap, entropy in ((None, None, True), (1e-9, None, True), (None, 9.0, False)):
        out = fg.linear_logprob(
            *(leaves[0], leaves[1], y),
            bias=leaves[2],
            softcap=softcap,
            temperature=0.8,
            outputs=("logp", "entropy") if entropy else ("logp",),
            workspace_mb=workspace,
            process_group=group,
            impl="torch",
        )
        total = out.logp.sin().sum() + (out.entropy.cos().sum() if entropy else 0.0)
        results += [out.logp.detach(), *torch.autograd.grad(total, leaves)]
    frozen = fg.linear_logprob(leaves[0], w, y, process_group=group, impl="torch")
    results += [frozen.logp.detach(), *torch.autograd.grad(frozen.logp.sum(), leaves[:1])]
    for name in ("dapo", "gmpo"):
        loss = fg.linear_grpo_loss(
            *(leaves[0], leaves[1], y, A, fg.Objective(name, entropy_coef=0.1)),
            seq_ids=ids,
            bias=leaves[2],
            process_group=group,
            impl="torch",
        ).loss
        results += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return results


def _worker(port: int, directory: str, rank: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    h, w, b, y, A, ids = _inputs()
    mine = slice(0, CUT) if rank == 0 else slice(CUT, V)
    results = _calls(h, w[mine], b[mine], y, A, ids, dist.group.WORLD)
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_shards_equal_the_whole(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    run_two_ranks(__file__, _free_port(), tmp_path)
    shards = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = _calls(*_inputs(), None)
    assert len(whole) == len(shards[0])
    for i, (want, a, b) in enumerate(zip(whole, *shards, strict=True)):
        if want.dim() and want.shape[0] == V:
            assert relative_error(torch.cat([a, b]), want) < 1e-11, i
        else:
            assert relative_error(a, want) < 1e-11 and relative_error(b, want) < 1e-11, i


def test_dtensor_weight_is_gathered(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        h, w, b, y, *_ = _inputs()
        sharded = distribute_tensor(w, init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
        plain = w.clone().requires_grad_()
        for weight in (sharded, plain):
            fg.linear_logprob(h, weight, y, bias=b).logp.sum().backward()
        assert torch.equal(sharded.grad.full_tensor(), plain.grad)
    finally:
        dist.destroy_process_group()


def test_reference_refuses_shards():
    h, w, _, y, *_ = _inputs()
    with pytest.raises(fg.InputError, match="process_group"):
        fg.linear_logprob(h, w, y, process_group=object(), impl="reference")


if __name__ == "__main__":
    _worker(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
