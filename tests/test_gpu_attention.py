# SPDX-License-Identifier: Apache-2.0
"""Shared-prefix attention and gather_rows on a GPU: real sizes, repeats, limits, every library."""

import inspect

import pytest
import torch

from fastgrpo.attention import torch_varlen
from fastgrpo.attention.registry import BACKENDS, get_backend
from fastgrpo.attention.varlen import Sequences, blocks
from fastgrpo.attention.vision import block_attention, varlen_provider
from fastgrpo.ops.gather_rows import gather_rows, row_index, sum_rows
from fastgrpo.ops.shared_prefix_attention import prefix_tables, shared_prefix_attention
from fastgrpo.packing.layout import GroupLayout
from fastgrpo.testing import assert_within_budget

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
RAGGED = [(1000, [256, 130, 77, 1, 200, 256, 31, 180])]  # a detection prompt of Qwen2.5-VL
NAMES = ("out", "dq", "dk", "dv")


def inputs(layout, heads, head_dim, dtype=torch.bfloat16):
    shapes = [(layout.total, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(s, device=DEVICE).to(dtype) for s in shapes]


def run(attend, tensors, *args, **options):
    *qkv, dout = tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves, *args, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def by_head(tensors, layout, dtype, **options):
    """Dense attention one key head at a time, so that the (T, T) masks of real sizes fit."""
    q, k, v, dout = (x.to(dtype) for x in tensors)
    share = q.shape[1] // k.shape[1]
    parts = []
    for h in range(k.shape[1]):
        mine = slice(h * share, (h + 1) * share)
        head = (q[:, mine], k[:, h : h + 1], v[:, h : h + 1], dout[:, mine])
        parts.append(run(get_backend("dense").attend, head, layout, **options))
    return [torch.cat(x, 1) for x in zip(*parts, strict=True)]


def within_budget(ours, tensors, layout, **options):
    dtype = tensors[0].dtype
    # Three TF32 products leave up to 2^-22 of each float32 product: 3.0 times the error of float32
    # in a simulation of these shapes (dq, head dimension 128).
    factor = 6.0 if dtype == torch.float32 else 2.0
    ref = by_head(tensors, layout, torch.float64, **options)
    same = by_head(tensors, layout, dtype, **options)
    for name, a, b, c in zip(NAMES, ours, ref, same, strict=True):
        assert_within_budget(a, b, c, factor=factor, what=name)


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "dense"])
@pytest.mark.parametrize("heads", [(28, 4), (16, 2), (4, 4)], ids=str)
def test_every_backend_equals_dense(name, heads):
    backend = get_backend(name)
    reason = backend.unavailable(DEVICE, torch.bfloat16, 128)
    if reason:
        pytest.skip(reason)
    layout = GroupLayout(RAGGED, device=DEVICE)
    tensors = inputs(layout, heads, 128)
    within_budget(run(backend.attend, tensors, layout, scale=0.09), tensors, layout, scale=0.09)


@pytest.mark.parametrize("name", ["triton", "flash_attn", "torch_varlen"])
def test_backends_with_a_sliding_window_equal_dense(name):
    backend = get_backend(name)
    reason = backend.unavailable(DEVICE, torch.bfloat16, 64)
    if reason:
        pytest.skip(reason)
    layout = GroupLayout(RAGGED, device=DEVICE)
    tensors = inputs(layout, (4, 2), 64)
    options = {"scale": 0.125, "window": 100}
    within_budget(run(backend.attend, tensors, layout, **options), tensors, layout, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 256])
def test_triton_head_dims_and_dtypes(head_dim, dtype):
    layout = GroupLayout([(261, [129, 64, 1, 0, 63]), (127, [5])], device=DEVICE)
    tensors = inputs(layout, (4, 2), head_dim, dtype)
    options = {"scale": head_dim**-0.5}
    ours = run(get_backend("triton").attend, tensors, layout, **options)
    within_budget(ours, tensors, layout, **options)


def test_triton_softcap_equals_the_reference():
    layout = GroupLayout([(261, [129, 64])], device=DEVICE)
    tables = prefix_tables(torch.tensor(layout.segments), DEVICE)
    tensors = inputs(layout, (4, 2), 128)
    results = [
        run(shared_prefix_attention, x, tables, softcap=5.0, impl=impl)
        for x, impl in (
            (tensors, "triton"),
            ([t.double() for t in tensors], "reference"),
            (tensors, "reference"),
        )
    ]
    for name, ours, ref, same in zip(NAMES, *results, strict=True):
        assert_within_budget(ours, ref, same, factor=3.0, what=name)


def test_triton_repeats_bitwise_250_times():
    layout = GroupLayout(RAGGED, device=DEVICE)
    tensors = inputs(layout, (28, 4), 128)
    first = run(get_backend("triton").attend, tensors, layout, scale=0.09)
    for _ in range(250):
        again = run(get_backend("triton").attend, tensors, layout, scale=0.09)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("heads", [(7, 1), (2, 1)], ids=str)
def test_triton_sums_of_cut_keys_equal_whole_ones(heads):
    segments = torch.tensor(GroupLayout(RAGGED).segments)
    cut = prefix_tables(segments, DEVICE, heads=heads, processors=132)
    whole = prefix_tables(segments, DEVICE, heads=heads, processors=1)
    assert cut.slots > whole.slots
    shapes = [(len(cut.positions), h, 128) for h in (heads[0], heads[1], heads[1], heads[0])]
    tensors = [torch.randn(s, device=DEVICE).bfloat16() for s in shapes]
    many, few = (
        run(shared_prefix_attention, tensors, tables, impl="triton") for tables in (cut, whole)
    )
    for name, a, b in zip(NAMES, many, few, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_triton_runs_on_its_tensors_device_whatever_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layout = GroupLayout([(100, [20, 3])], device="cuda:1")
    tensors = [torch.randn(123, h, 64, device="cuda:1").bfloat16() for h in (4, 2, 2, 4)]
    ours = run(get_backend("triton").attend, tensors, layout, scale=0.1)
    within_budget(ours, tensors, layout, scale=0.1)


def test_triton_one_row_of_131072_tokens():
    layout = GroupLayout([(65_536, [16_384] * 4)], device=DEVICE)
    tensors = inputs(layout, (2, 1), 128)
    out, *grads = run(get_backend("triton").attend, tensors, layout, scale=0.09)
    q, k, v, _ = (x.double() for x in tensors)
    for row in (0, 65_535, 65_536, 98_303, 131_071):
        start = 65_536 + (row - 65_536) // 16_384 * 16_384 if row >= 65_536 else row + 1
        seen = torch.cat([torch.arange(min(row + 1, 65_536)), torch.arange(start, row + 1)])
        seen = seen.to(DEVICE)
        weights = torch.softmax(0.09 * q[row] @ k[seen, 0].T, -1)  # (H, keys)
        torch.testing.assert_close(out[row].double(), weights @ v[seen, 0], rtol=2e-2, atol=2e-2)
    assert all(bool(g.isfinite().all()) for g in grads)


def test_triton_more_than_2_31_elements():
    # 66 000 tokens x 256 heads x 128 = 2.16e9 elements: the last rows lie beyond 32-bit offsets.
    layout = GroupLayout([(1, [999])] * 66, device=DEVICE)
    q = torch.randn(layout.total, 256, 128, device=DEVICE, dtype=torch.bfloat16)
    assert q.numel() > 2**31
    k, v = (torch.randn(layout.total, 1, 128, device=DEVICE).bfloat16() for _ in range(2))
    big = get_backend("triton").attend(q, k, v, layout, scale=0.09)
    last = GroupLayout([(1, [999])], device=DEVICE)
    tail = [x[-1000:].contiguous() for x in (q, k, v)]
    assert torch.equal(big[-1000:], get_backend("triton").attend(*tail, last, scale=0.09))


def test_triton_lengths_and_scalars_do_not_recompile():
    from fastgrpo_kernels import shared_prefix_attention as kernels

    attend = get_backend("triton").attend

    def compiled():
        found = [kernels._shared_prefix_fwd_kernel, kernels._shared_prefix_dq_kernel]
        found += [kernels._shared_prefix_dkv_kernel, kernels._shared_prefix_sum_kernel]
        return sum(len(k.device_caches[torch.cuda.current_device()][0]) for k in found)

    def step(lengths, scale, window):
        layout = GroupLayout(lengths, device=DEVICE)
        run(attend, inputs(layout, (4, 2), 64), layout, scale=scale, window=window)

    for window in (None, 10):
        step([(100, [20, 30])], 0.125, window)
    before = compiled()
    for lengths, scale, window in (
        ([(1, [1])], 1.0, 1),
        ([(128, [16] * 4)], 0.1, 16),
        ([(257, [33, 1, 0]), (16, [])], 0.3, 17),
    ):
        step(lengths, scale, window)
        step(lengths, scale, None)
    assert compiled() == before


def test_torch_varlen_aligns_causal_masks_bottom_right_and_shares_key_heads():
    reason = torch_varlen.unavailable(DEVICE, torch.bfloat16, 64)
    if reason:
        pytest.skip(reason)
    q = torch.randn(3, 4, 64, device=DEVICE).bfloat16()
    k, v = (torch.randn(8, 2, 64, device=DEVICE).bfloat16() for _ in range(2))
    bounds = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 3], [0, 8])]
    out = torch_varlen.varlen(q, k, v, Sequences(*bounds, 3, 8), 0.125, (-1, 0))
    keys, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
    s = torch.einsum("qhd,khd->hqk", q.double(), keys) * 0.125
    hidden = torch.arange(8, device=DEVICE)[None] > torch.arange(3, device=DEVICE)[:, None] + 5
    want = torch.einsum("hqk,khd->qhd", s.masked_fill(hidden, float("-inf")).softmax(-1), values)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_vision_tower_in_one_call_equals_block_by_block(head_dim):
    attend = varlen_provider(DEVICE, torch.bfloat16, head_dim)
    if attend is None:
        pytest.skip("neither flash-attn nor torch's varlen attention runs here")
    bounds = torch.tensor([0, 64, 128, 144, 1000], device=DEVICE)  # windows and a whole image
    q, k, v = (torch.randn(1000, 16, head_dim, device=DEVICE).bfloat16() for _ in range(3))
    one = attend(q, k, v, blocks(bounds), head_dim**-0.5)
    many = block_attention(q, k, v, bounds, scale=head_dim**-0.5)
    torch.testing.assert_close(one, many, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_gather_rows_on_a_gpu_is_exact_and_repeats_bitwise(impl):
    layout = GroupLayout(RAGGED, device=DEVICE)
    index = row_index(layout.kv_index, layout.total)
    x = torch.randn(layout.total, 4, 128, device=DEVICE).bfloat16().requires_grad_()
    dout = torch.randn(len(layout.kv_index), 4, 128, device=DEVICE).bfloat16()
    y = gather_rows(x, index, impl=impl)
    assert torch.equal(y, x[layout.kv_index])
    (first,) = torch.autograd.grad(y, x, dout)
    want = torch.zeros_like(x, dtype=torch.float64)
    want.index_add_(0, layout.kv_index, dout.double())
    # one rounding of the float32 sum to bfloat16
    torch.testing.assert_close(first.double(), want, rtol=2**-8, atol=1e-6)
    for _ in range(250):
        assert torch.equal(first, sum_rows(dout, index, impl=impl))


def test_gather_rows_more_than_2_31_elements():
    rows = 2**31 // 4096 + 3
    x = torch.empty(rows, 4096, dtype=torch.bfloat16, device=DEVICE)
    x[-1], x[0] = 1.0, 2.0
    index = row_index(torch.tensor([rows - 1, 0, rows - 1], device=DEVICE), rows)
    y = gather_rows(x, index, impl="triton")
    assert torch.equal(y[:, 0].float().cpu(), torch.tensor([1.0, 2.0, 1.0]))
    back = sum_rows(y, index, impl="triton")
    assert back[-1, -1] == 2 and back[0, -1] == 2 and back[1:-1].count_nonzero() == 0


def test_installed_varlen_attn_still_has_what_we_call():
    from torch.nn.attention.varlen import varlen_attn

    assert {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)
