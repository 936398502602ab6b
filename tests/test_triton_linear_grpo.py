# SPDX-License-Identifier: Apache-2.0
"""The fused ops through the Triton kernels, under Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

import fastgrpo as fg
from fastgrpo.testing import relative_error

pytestmark = pytest.mark.interpreter
N, D, V = 13, 8, 97  # prime vocabulary, one chunk and several
SEQ_IDS = torch.tensor([0] * 5 + [1] * 4 + [2] * 4)


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[2] = -100
    hidden, weight = (torch.randn(n, D, generator=g) for n in (N, V))
    return hidden, weight, targets


def both(f, hidden, weight, need=(True, True)):
    """f(hidden, weight, cast, impl) by Triton in float32 and by the reference in float64."""
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [
            x.to(dtype).requires_grad_(n) for x, n in zip((hidden, weight), need, strict=True)
        ]
        outputs, total = f(*leaves, lambda x, dtype=dtype: x.to(dtype), impl)
        wanted = [x for x in leaves if x.requires_grad]
        results.append((*outputs, *torch.autograd.grad(total, wanted)))
    for ours, want in zip(*results, strict=True):
        assert relative_error(ours, want) < 5e-6


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("workspace_mb", [None, 0.002])
def test_linear_logprob_triton(need, workspace_mb):
    hidden, weight, targets = inputs()
    temperature, bias = torch.rand(N) + 0.5, torch.randn(V)

    def f(hidden, weight, cast, impl):
        out = fg.linear_logprob(
            hidden,
            weight,
            targets,
            bias=cast(bias),
            temperature=cast(temperature),
            softcap=5.0,
            logit_scale=0.5,
            outputs=("logp", "entropy"),
            workspace_mb=workspace_mb,
            impl=impl,
        )
        return (out.logp, out.entropy), out.logp.sum() + 0.3 * out.entropy.sum()

    both(f, hidden, weight, need)


@pytest.mark.parametrize(
    ("loss_type", "level"),
    [("dapo", "token"), ("grpo", "sequence"), ("gmpo", "token"), ("vespo", "token")],
)
@pytest.mark.parametrize("workspace_mb", [None, 0.002, 1.0])  # chunks, small ones, all kept
def test_linear_grpo_loss_triton(loss_type, level, workspace_mb):
    hidden, weight, targets = inputs(1)
    advantages, old = torch.tensor([1.0, -0.5, 0.3]), -torch.rand(N) * 4
    obj = fg.Objective(loss_type, importance_sampling_level=level, beta=0.1, entropy_coef=0.01)

    def f(hidden, weight, cast, impl):
        out = fg.linear_grpo_loss(
            hidden,
            weight,
            targets,
            cast(advantages),
            obj,
            seq_ids=SEQ_IDS,
            old_logp=cast(old),
            ref_logp=cast(old + 0.1),
            workspace_mb=workspace_mb if impl == "triton" else None,
            impl=impl,
        )
        return (out.loss, out.logp, *out.metrics.values()), out.loss

    both(f, hidden, weight)


def test_linear_grpo_loss_triton_recomputes_rows_that_overflow():
    hidden, weight, targets = inputs(2)
    hidden[4] = 100.0 * weight[(targets[4] + 1) % V]  # the target is e^-1000 likely

    def f(hidden, weight, cast, impl):
        out = fg.linear_logprob(hidden, weight, targets, impl=impl)
        return (out.logp,), out.logp.sum()

    both(f, hidden, weight)
