# SPDX-License-Identifier: Apache-2.0
"""The shared-prefix attention kernels in Triton's interpreter, against the float64 definition."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)

import torch

from fastgrpo.ops import prefix_tables as tables_of
from fastgrpo.ops import shared_prefix_attention as op
from fastgrpo.reference import shared_prefix_attention as reference
from fastgrpo.testing import assert_within_budget

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
]

# The interpreter's tiles have 32 queries and 16 keys (forward, dq), or 16 keys (dkv).
GROUPS = [(17, [16, 1, 5])]  # prompt one over a tile; completions of a tile, one token, a prime


@pytest.fixture(autouse=True)
def _small_entries(monkeypatch):
    """Two tiles per table entry instead of eight: the same code, fewer idle programs."""
    monkeypatch.setattr(tables_of, "BLOCK_ROWS", 32)


def segments(groups: list[tuple[int, list[int]]]) -> torch.Tensor:
    rows, at = [], 0
    for prompt, completions in groups:
        start, at = at, at + prompt
        rows.append([start, at, start, start])
        for length in completions:
            rows.append([at, at + length, start, start + prompt])
            at += length
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def check(
    groups, heads=(2, 1), head_dim=16, dtype=torch.float32, factor=2.0, spread=1.0,
    cancelling=False, processors=1, **options,
):  # fmt: skip
    """Output and the three gradients of the kernel within `factor` of same-dtype PyTorch.

    cancelling: p is all on one key, so that dq and dk are differences of equal sums. Their error
    is then not relative to themselves but to their terms, times the logit that exp2 sees again; so
    is dv's, since p is not divided by its sum again.
    """
    seg = segments(groups)
    tables = op.prefix_tables(seg, heads=heads, processors=processors)
    tokens = int(seg[-1, 1]) if len(seg) else 0
    inputs = [spread * torch.randn(tokens, h, head_dim) for h in (heads[0], heads[1], heads[1])]
    inputs = [x.to(dtype) for x in inputs]
    dout = torch.randn(tokens, heads[0], head_dim).to(dtype)

    def run(f, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = f(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    scale = options.get("scale") or head_dim**-0.5
    plain = [seg, scale, options.get("window"), options.get("softcap")]
    ref = run(
        lambda *x: reference.shared_prefix_attention(*x, *plain), [x.double() for x in inputs]
    )
    same = run(lambda *x: masked_attention(*x, *plain), inputs)
    ours = run(lambda *x: op.shared_prefix_attention(*x, tables, impl="triton", **options), inputs)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, ref, same, strict=True):
        assert a.dtype == dtype
        if cancelling and name != "out":
            q, k, v, g = (x.double().abs() for x in (*inputs, dout))
            logit = scale * (q.sum(-1).max() * k.max())
            term = scale * g.sum(-1).max() * v.max() * torch.maximum(q, k).max()
            term = g.sum((0, 1)).max() if name == "dv" else term
            c = b + torch.finfo(dtype).eps * (1 + logit) * term
        assert_within_budget(a, b, c, factor=factor, what=name)
    return ours


def masked_attention(q, k, v, seg, scale, window, softcap):
    """Plain attention that stays in the inputs' dtype: what the kernel's error is measured by."""
    share = q.shape[1] // k.shape[1]
    q, k, v = (
        x.transpose(0, 1) for x in (q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1))
    )
    s = (q @ k.transpose(1, 2)) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    seen = reference.visible_keys(seg, q.shape[1], window)
    return (torch.softmax(s.masked_fill(~seen, float("-inf")), -1) @ v).transpose(0, 1)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (7, 1)])
def test_triton_matches_reference_for_every_head_ratio(heads):
    check([(9, [4, 3])], heads=heads)


@pytest.mark.parametrize(
    "heads, processors, options",
    [
        ((3, 1), 1, {}),  # shares that end within a head
        ((2, 1), 1, {"window": 21, "softcap": 2.0}),
        ((1, 1), 1, {}),  # of rows alone
    ],
)
def test_triton_keys_cut_into_items(monkeypatch, heads, processors, options):
    monkeypatch.setattr(tables_of, "SMALLEST_ITEM", 32)
    groups = [(33, [20])]
    made = op.prefix_tables(segments(groups), heads=heads, processors=processors)
    assert made.slots > 1 and bool((made.items[:, 6] < 0).any())  # and whole blocks beside them
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(check(groups, heads=heads, processors=processors, **options))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_tables_made_for_other_heads_are_right_too(monkeypatch):
    monkeypatch.setattr(tables_of, "SMALLEST_ITEM", 32)
    seg = segments([(33, [5])])
    q, k, v = (torch.randn(38, h, 16).requires_grad_() for h in (2, 1, 1))
    grads = []
    for heads in ((2, 1), (7, 1)):
        tables = op.prefix_tables(seg, heads=heads, processors=2)
        out = op.shared_prefix_attention(q, k, v, tables, impl="triton")
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128, 256])
def test_triton_matches_reference_for_every_head_dim(head_dim):
    check([(18, [3])], heads=(1, 1), head_dim=head_dim)


@pytest.mark.parametrize(
    "groups",
    [
        [(33, [])],  # no completions: plain causal attention
        [(31, [33])],  # one completion; a query tile minus and plus one
        [(16, [16, 16])],  # exact tiles
        [(15, [0, 17, 0]), (0, [5, 3])],  # empty completions and an empty prompt
        [(3, [2, 1]), (1, [1, 1, 1]), (5, []), (2, [7])],  # several groups in one tile's rows
        [(13, [1] * 6)],  # one-token completions
    ],
    ids=str,
)
def test_triton_matches_reference_for_ragged_groups(groups):
    check(groups, heads=(1, 1))


@pytest.mark.parametrize("groups", [[(1, [])], [(1, [1])]], ids=str)
def test_triton_matches_reference_for_one_token(groups):
    check(groups, heads=(1, 1), cancelling=True)


@pytest.mark.parametrize("window", [1, 7, 16, 100])
def test_triton_sliding_window_counts_text_positions(window):
    check([(19, [18, 2])], heads=(1, 1), window=window, cancelling=window == 1)


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"softcap": 0.5, "window": 5}, {"scale": 0.5}]
)
def test_triton_softcap_and_scale(options):
    check(GROUPS, heads=(1, 1), **options)


def test_triton_half_precision():
    # float16 stands for bfloat16 too, whose bits the interpreter's dot multiplies as integers
    check(GROUPS, dtype=torch.float16)


def test_triton_reads_strided_inputs_where_they_are():
    tokens = sum(p + sum(c) for p, c in GROUPS)
    joined = torch.randn(tokens, 4, 32)  # q, k, v as slices of one projection, as models make them
    inputs = (joined[:, :2, :16], joined[:, 2:3, 16:], joined[:, 3:, :16])
    tables = op.prefix_tables(segments(GROUPS))
    outs, grads = [], []
    for tensors in (inputs, [x.contiguous() for x in inputs]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = op.shared_prefix_attention(*leaves, tables, impl="triton")
        outs.append(out)
        # an expanded gradient (stride 0), as out.sum() gives
        grads.append(torch.autograd.grad(out.sum(), leaves))
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_triton_head_major_inputs_and_odd_strides():
    tokens = 20
    heads_first = torch.randn(3, 2, tokens, 16)  # (B, H, T, D), as transformers passes them
    odd = torch.randn(3, tokens, 2, 17)[..., :16]  # rows not aligned to 8 elements: copied
    for x in (heads_first.transpose(1, 2), odd):
        tables = op.prefix_tables(segments([(15, [5])]))
        ours = op.shared_prefix_attention(*x, tables, impl="triton")
        same = op.shared_prefix_attention(*x, tables, impl="reference")
        torch.testing.assert_close(ours, same, rtol=1e-5, atol=1e-5)


def test_triton_large_logits_stay_finite():
    ours = check([(9, [9])], heads=(1, 1), spread=30.0, cancelling=True)
    assert all(bool(x.isfinite().all()) for x in ours)


def test_triton_nan_stays_in_its_own_completion():
    tables = op.prefix_tables(segments([(9, [9, 9]), (4, [3])]))
    q, k, v = (torch.randn(34, 1, 16) for _ in range(3))
    k[20] = float("nan")  # in the second completion
    k.requires_grad_()
    out = op.shared_prefix_attention(q, k, v, tables, impl="triton")
    assert out[20:27].isnan().all()
    clean = torch.cat([out[:18], out[27:]])
    assert clean.isfinite().all()
    (dk,) = torch.autograd.grad(clean.sum(), k)
    assert dk[9:18].isfinite().all() and dk[27:].isfinite().all()


def test_triton_repeats_bitwise_and_isolates_completions():
    tables = op.prefix_tables(segments(GROUPS))
    q, k, v = (torch.randn(39, 2, 16) for _ in range(3))
    first = op.shared_prefix_attention(q, k, v, tables, impl="triton")
    assert torch.equal(first, op.shared_prefix_attention(q, k, v, tables, impl="triton"))
    k[17:33] += 1  # the first completion
    changed = op.shared_prefix_attention(q, k, v, tables, impl="triton")
    assert torch.equal(changed[:17], first[:17]) and torch.equal(changed[33:], first[33:])
    assert not torch.equal(changed[17:33], first[17:33])


def test_triton_only_some_inputs_need_grad():
    tables = op.prefix_tables(segments([(5, [4])]))
    q, k, v = (torch.randn(9, 1, 16) for _ in range(3))
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(op.shared_prefix_attention(*full, tables, impl="triton").sum(), full)
    for i in range(3):
        some = [x.clone().requires_grad_(j == i) for j, x in enumerate((q, k, v))]
        out = op.shared_prefix_attention(*some, tables, impl="triton")
        (got,) = torch.autograd.grad(out.sum(), some[i])
        assert torch.equal(got, want[i])


def test_triton_empty_row():
    tables = op.prefix_tables(torch.zeros(0, 4, dtype=torch.int64))
    q = torch.zeros(0, 2, 16, requires_grad=True)
    out = op.shared_prefix_attention(q, q, q, tables, impl="triton")
    out.sum().backward()
    assert out.shape == q.shape and q.grad.shape == q.shape


def test_triton_op_passes_opcheck():
    from fastgrpo_kernels.shared_prefix_attention import shared_prefix_attention_op

    tables = op.prefix_tables(segments([(5, [2])]))
    q, k, v = (torch.randn(7, 1, 16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(
        shared_prefix_attention_op,
        (q, k, v, *tables[1:], 0.25, 0, 0.0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_triton_refuses_a_gradient_through_lse():
    from fastgrpo_kernels.shared_prefix_attention import shared_prefix_attention_op

    tables = op.prefix_tables(segments([(5, [2])]))
    q = torch.randn(7, 1, 16, requires_grad=True)
    _, lse = shared_prefix_attention_op(q, q, q, *tables[1:], 0.25, 0, 0.0)
    with pytest.raises(AssertionError, match="lse"):
        lse.sum().backward()


def test_triton_compiles_into_one_graph():
    tables = op.prefix_tables(segments([(5, [2])]))
    q, k, v = (torch.randn(7, 1, 16, requires_grad=True) for _ in range(3))

    def f(q, k, v):
        return op.shared_prefix_attention(q * 2, k, v, tables, impl="triton").sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), f(q, k, v))


def test_triton_inside_a_model_equals_dense():
    import fastgrpo as fg
    from fastgrpo.testing import models as tm

    model = tm.tiny_model(
        "qwen2_5_vl",
        text={"num_hidden_layers": 1},
        vision={"depth": 1, "fullatt_block_indexes": [0]},
    )
    groups = tm.synthetic_groups(model, [(((4, 6),), 3, (3, 1))])
    results = []
    for backend in ("triton", "dense"):
        logp = [s.logp for s in fg.score(model, groups, backend=backend, self_check=False)]
        tm.weighted_sum(logp, tm.random_weights(groups)).backward()
        results.append(([x.detach() for x in logp[0]], tm.take_grads(model)))
    (ours, our_grads), (want, want_grads) = results
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    error, where = tm.grad_error(our_grads, want_grads)
    assert error <= 2e-5, where
