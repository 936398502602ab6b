# SPDX-License-Identifier: Apache-2.0
"""Calls into flash-attn, torch's varlen and xformers, checked against their published signatures.

The stand-ins carry the signatures of flash-attn 2.8.3.post2, torch 2.11 and xformers 0.0.35 and
compute, in plain PyTorch, what those versions document. On a GPU the real ones run
(test_gpu_attention.py).
"""

import inspect
import sys
import types

import pytest
import torch

import fastgrpo as fg
from fastgrpo.attention import flash_attn, registry, torch_varlen, vision, xformers
from fastgrpo.attention.dense import attend as dense
from fastgrpo.attention.varlen import blocks
from fastgrpo.packing.layout import GroupLayout

# two groups; empty, one-token and longer completions, a prompt without any
LENGTHS = [(7, [3, 1, 0, 5]), (4, []), (2, [6])]


def bottom_right(q, k, v, cu_q, cu_k, max_q, max_k, scale, left, right):
    """Variable-length attention as flash-attn 2.1 and later define it, key heads shared."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q[-1]) == len(q) and int(cu_k[-1]) == len(k) == len(v)
    outs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert b - a <= max_q and d - c <= max_k
        share = q.shape[1] // k.shape[1]
        x, y, z = q[a:b], k[c:d].repeat_interleave(share, 1), v[c:d].repeat_interleave(share, 1)
        diagonal = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        column = torch.arange(d - c)[None]
        hidden = torch.zeros(b - a, d - c, dtype=torch.bool)
        if right >= 0:
            hidden |= column > diagonal + right
        if left >= 0:
            hidden |= column < diagonal - left
        s = torch.einsum("qhd,khd->hqk", x, y) * scale
        outs.append(
            torch.einsum("hqk,khd->qhd", s.masked_fill(hidden, float("-inf")).softmax(-1), z)
        )
    return torch.cat(outs)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    left, right = window_size
    right = 0 if causal else right
    return bottom_right(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, left, right
    )


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    assert query.shape[1] == key.shape[1], "2.11 documents equal head counts only"
    return bottom_right(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, *window_size)


def varlen_attn_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    return bottom_right(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, *window_size)


class BlockDiagonalMask:
    causal = False

    def __init__(self, q_seqlen, kv_seqlen):
        self.q_seqlen, self.kv_seqlen = q_seqlen, kv_seqlen

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert kv_seqlen is None or len(q_seqlen) == len(kv_seqlen)
        return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)

    def hidden(self):
        block = [torch.ones(a, b).tril() if self.causal else torch.ones(a, b) for a, b in zip(
            self.q_seqlen, self.kv_seqlen, strict=True)]  # fmt: skip
        return torch.block_diag(*block) == 0


class BlockDiagonalCausalMask(BlockDiagonalMask):
    causal = True


def memory_efficient_attention_partial_autograd(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    assert query.dim() == key.dim() == 4 and query.shape[2] == key.shape[2]
    s = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    s = s.masked_fill(attn_bias.hidden(), float("-inf"))
    return s, value


def merge_attentions_autograd(*partials):
    s = torch.cat([s for s, _ in partials], -1)
    v = torch.cat([v for _, v in partials], 1)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)


def module(name, **members):
    out = types.ModuleType(name)
    out.__dict__.update(members)
    return out


@pytest.fixture(params=["flash_attn", "torch 2.11", "torch 2.13", "xformers"])
def library(request, monkeypatch):
    """A backend of ours, and the library it calls replaced by its stand-in."""
    if request.param == "flash_attn":
        fake = module("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
        monkeypatch.setitem(sys.modules, "flash_attn", fake)
        return flash_attn
    if request.param == "xformers":
        bias = module(
            "attn_bias",
            BlockDiagonalMask=BlockDiagonalMask,
            BlockDiagonalCausalMask=BlockDiagonalCausalMask,
        )
        merge = module(
            "merge_training",
            memory_efficient_attention_partial_autograd=memory_efficient_attention_partial_autograd,
            merge_attentions_autograd=merge_attentions_autograd,
        )
        fmha = module("xformers.ops.fmha", attn_bias=bias, merge_training=merge)
        names = {"xformers": module("xformers"), "xformers.ops": module("xformers.ops")}
        for name, fake in (names | {"xformers.ops.fmha": fmha}).items():
            monkeypatch.setitem(sys.modules, name, fake)
        return xformers
    import torch.nn.attention.varlen as real

    stand_in = varlen_attn_2_11 if request.param == "torch 2.11" else varlen_attn_2_13
    monkeypatch.setattr(real, "varlen_attn", stand_in)
    torch_varlen._has_gqa.cache_clear()
    request.addfinalizer(torch_varlen._has_gqa.cache_clear)
    return torch_varlen


@pytest.mark.parametrize("lengths", [LENGTHS, [(3, [])], [(1, [1])]], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1)])
def test_library_call_equals_dense(library, lengths, heads):
    layout = GroupLayout(lengths)
    inputs = [torch.randn(layout.total, h, 8, dtype=torch.float64) for h in (heads[0], heads[1])]
    inputs.append(torch.randn_like(inputs[1]))
    dout = torch.randn_like(inputs[0])
    results = []
    for attend in (library.attend, dense):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, layout, scale=0.3)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_library_call_with_a_sliding_window(library, window):
    layout = GroupLayout(LENGTHS)
    q, k, v = (torch.randn(layout.total, 2, 8, dtype=torch.float64) for _ in range(3))
    if library is xformers:
        with pytest.raises(fg.InputError, match="sliding window"):
            library.attend(q, k, v, layout, scale=0.3, window=window)
        return
    ours = library.attend(q, k, v, layout, scale=0.3, window=window)
    want = dense(q, k, v, layout, scale=0.3, window=window)
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)


def test_library_call_for_the_vision_tower(library):
    if library is xformers:
        pytest.skip("xformers serves text only")
    bounds = torch.tensor([0, 4, 5, 12])
    q, k, v = (torch.randn(12, 2, 8, dtype=torch.float64) for _ in range(3))
    ours = library.attend_blocks(q, k, v, blocks(bounds), 0.3)
    want = vision.block_attention(q, k, v, bounds, scale=0.3)
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)


def test_stand_in_for_torch_has_the_installed_signature():
    from torch.nn.attention.varlen import varlen_attn

    installed = list(inspect.signature(varlen_attn).parameters)
    stand_ins = [inspect.signature(f).parameters for f in (varlen_attn_2_11, varlen_attn_2_13)]
    assert installed[: len(stand_ins[0])] == list(stand_ins[0])
    known = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if known == (2, 13):
        assert installed == list(stand_ins[1])


def test_stand_in_for_flash_attn_has_the_installed_signature():
    real = pytest.importorskip("flash_attn")
    installed = list(inspect.signature(real.flash_attn_varlen_func).parameters)
    assert installed == list(inspect.signature(flash_attn_varlen_func).parameters)


def test_stand_in_for_xformers_has_the_installed_signature():
    real = pytest.importorskip("xformers.ops.fmha.merge_training")
    for ours in (memory_efficient_attention_partial_autograd, merge_attentions_autograd):
        installed = inspect.signature(getattr(real, ours.__name__))
        assert list(installed.parameters) == list(inspect.signature(ours).parameters)


@pytest.mark.parametrize("name", list(registry.BACKENDS))
def test_backend_gives_a_reason_when_it_cannot_serve(name):
    reason = registry.get_backend(name).unavailable(torch.device("cpu"), torch.bfloat16, 64)
    if name in ("dense", "kvgather"):
        assert reason is None
        return
    assert "CUDA" in reason or "not installed" in reason or "float32" in reason
    with pytest.raises(fg.InputError, match=f"backend='{name}' cannot serve: "):
        registry.choose_backend(name, torch.device("cpu"), torch.bfloat16, 64)


@pytest.mark.parametrize(
    "dtype, head_dim, word", [(torch.float32, 64, "float16"), (torch.bfloat16, 20, "multiples")]
)
def test_flash_backends_name_what_they_take(monkeypatch, dtype, head_dim, word):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = torch_varlen.unavailable(torch.device("cuda"), dtype, head_dim)
    assert word in reason
    assert torch_varlen.unavailable(torch.device("cuda"), torch.bfloat16, 64) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in torch_varlen.unavailable(torch.device("cuda"), torch.bfloat16, 64)
