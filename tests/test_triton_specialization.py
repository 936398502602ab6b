# SPDX-License-Identifier: Apache-2.0
"""Scalars and lengths never recompile a kernel: launches that differ in them share one cache key.

The launchers run for real up to the launch, which is recorded in place of a GPU.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from fastgrpo_kernels import aot
from fastgrpo_kernels.box_iou import pairwise_box_iou
from fastgrpo_kernels.gather_rows import gather_rows_op, sum_rows_op
from fastgrpo_kernels.group_advantages import group_advantages
from fastgrpo_kernels.grpo_loss import grpo_terms
from fastgrpo_kernels.linear_kl import kl_of_logits, logit_gradients_
from fastgrpo_kernels.offset_exp import offset_exp
from fastgrpo_kernels.shared_prefix_attention import shared_prefix_attention_op
from fastgrpo_kernels.token_kl import token_kl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastgrpo.losses.tokens import Tokens
from fastgrpo.objective import Objective
from fastgrpo.ops import prefix_tables
from fastgrpo.packing.layout import GroupLayout


@pytest.fixture
def keys(monkeypatch):
    """The cache keys of the launches made so far."""
    found = set()
    backend = CUDABackend(GPUTarget("cuda", 90, 32))

    def record(self, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, options = bind(*args, **kwargs)
        found.add((self.__name__, repr(specialization), repr(sorted(options.items()))))

    monkeypatch.setattr(JITFunction, "run", record)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offset_exp_compiles_once(keys, dtype):
    for C, scale, softcap, temperature in ((1, 1.0, 30.0, 1.0), (16, 0.5, 1.0, 0.7), (7, 2, 8, 2)):
        offset_exp(
            torch.zeros(C, 64),
            torch.zeros(C + 1, dtype=torch.long)[C % 2 :][:C],  # a slice may start anywhere
            inv_temperature=torch.full((C + 1,), float(temperature))[C % 2 :][:C],
            logit_scale=scale,
            softcap=softcap,
            exp_dtype=dtype,
        )
    assert len(keys) == 1


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_loss_compiles_once(keys, level):
    for N, B, epsilon, beta, delta in (
        (1, 1, 0.2, 0.04, 1.5),
        (16, 2, 1, 1, 2),
        (33, 5, 0.0, 2, 9),
    ):
        obj = Objective(
            "grpo", level, epsilon=epsilon, beta=beta, delta=delta, log_ratio_clamp=N + 1
        )
        start = N % 2  # chunks are slices, which may start anywhere
        zeros = torch.zeros(N + 1)[start:][:N]
        ids = (torch.arange(N + 1) * B // (N + 1))[start:][:N]
        mask = torch.ones(N + 1, dtype=torch.bool)[start:][:N]
        t = Tokens(zeros, torch.zeros(B), ids, mask, zeros, zeros)
        loss, _ = grpo_terms(
            t._replace(logp=zeros.clone().requires_grad_()),
            *(obj, B, None, (), float(N), float(N), 2 * B, ["policy_loss", "kl"]),
        )
        loss.backward()
    assert len(keys) == 2  # forward, backward


def test_token_kl_compiles_once(keys):
    for N, clamp, limit in ((1, 20.0, None), (16, 1, 10), (4097, 3.5, 1.0)):
        streams = torch.zeros(2, N + 1)[:, N % 2 :][:, :N]
        token_kl(*streams, "k3", clamp, limit)
    assert len(keys) == 1


def test_linear_kl_compiles_once(keys):
    for C in (1, 16, 33):
        z = torch.zeros(C, 48)
        kl_of_logits(z, z.clone())
        logit_gradients_(z, z.clone(), *torch.zeros(2, C + 1)[:, C % 2 :][:, :C])
    assert len(keys) == 2


def test_group_advantages_compiles_once_per_tile_width(keys):
    for sizes, eps in (([3], 1e-4), ([4] * 16, 1), ([4, 2], 0.5), ([0, 3], 1e-6)):
        rewards = torch.zeros(sum(sizes) + 1)[len(sizes) % 2 :][: sum(sizes)]
        group_advantages(rewards, torch.tensor(sizes), max(sizes), eps=eps)
    assert len(keys) == 1
    for B in (8, 16, 40):
        group_advantages(torch.zeros(B), 8)
    assert len(keys) == 2
    group_advantages(torch.zeros(300), 300)
    assert len(keys) == 3


@pytest.mark.parametrize("columns", [512, 80, 7])
def test_gather_rows_compiles_once_per_width(keys, columns):
    for N, M, offset in ((3, 1, 0), (16, 64, 1), (5, 33, 4)):
        x = torch.zeros(N * columns + 8)[offset:][: N * columns].view(N, columns)
        index = torch.zeros(M + 1, dtype=torch.long)[M % 2 :][:M]
        first = torch.full((N + 1,), M)
        gather_rows_op(x, index, index, first)
        sum_rows_op(torch.zeros(M, columns), index, index, first)
    assert len(keys) == 2


def test_pairwise_box_iou_compiles_once_per_tile_width(keys):
    for n, m in ((9, 1), (16, 33), (100, 20)):  # tables of one more, so of both alignments
        a, b = torch.rand(n, 4).requires_grad_(), torch.rand(m, 4).requires_grad_()
        sizes = ([n], [m]) if n % 2 else ([n, 0], [m, 0])
        value = pairwise_box_iou(a, b, *sizes, kind="giou", convention="continuous")
        value.sum().backward()
    assert len(keys) == 3  # values, and the gradients of either side


@pytest.mark.parametrize("stem", ["offset_exp", "linear_kl"])
def test_every_variant_sums_a_row_over_one_layout(stem):
    """A tree of additions follows the layout of its lanes, and that the dtypes of the memory they
    come from: bfloat16 exponentials gave threads eight columns, float32 ones four."""
    layouts = set()
    for spec in aot.collect("sm_90", (stem,)):
        text = aot.compile_spec(spec, "sm_90").asm["ttgir"]
        blocked = dict(re.findall(r"(#\w+) = #ttg.blocked<\{([^}]*)\}", text))
        reduced = re.findall(r"\}\) : \(tensor<\d+xf32, (#\w+)>", text)
        assert reduced
        layouts |= {blocked[name] for name in reduced}
    assert len(layouts) == 1, layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prefix_attention_compiles_each_kernel_once(keys, monkeypatch, dtype):
    monkeypatch.setattr(prefix_tables, "SMALLEST_ITEM", 64)
    for lengths, processors, offset, scale in (
        ([(1, [])], 1, 0, 1.0),
        ([(200, [30, 1])], 1, 1, 0.1),  # blocks of keys cut into parts, inputs that are not aligned
        ([(128, [16] * 4), (3, [5])], 8, 8, 2.0),
        ([(257, [129, 1, 0]), (16, [])], 3, 24, 0.3),
    ):
        segments = torch.tensor(GroupLayout(lengths).segments)
        tables = prefix_tables.prefix_tables(segments, heads=(4, 2), processors=processors)
        size = int(segments[-1, 1]) * 8 * 16
        qkv = torch.zeros(size + 24, dtype=dtype)[offset:][:size].view(-1, 8, 16)
        q, k, v = (x.requires_grad_() for x in qkv.split((4, 2, 2), 1))
        out = shared_prefix_attention_op(q, k, v, *tables[1:], scale, 0, 0.0)[0]
        out.backward(torch.ones_like(out))
    assert sorted(name for name, *_ in keys) == [
        "_shared_prefix_dkv_kernel",
        "_shared_prefix_dq_kernel",
        "_shared_prefix_fwd_kernel",
        "_shared_prefix_sum_kernel",
    ]
