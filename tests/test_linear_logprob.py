# SPDX-License-Identifier: Apache-2.0
"""linear_logprob: values, gradients, plans and promises. N rows, D hidden, V vocabulary."""

import itertools
import math

import pytest
import torch

import fastgrpo as fg
from fastgrpo.ops.linear import head, logprob
from fastgrpo.ops.linear.logprob import linear_logprob_op
from fastgrpo.ops.select import why_not
from fastgrpo.testing import assert_within_budget, relative_error

CPU = torch.device("cpu")
FAST = [impl for impl in ("torch", "cpp") if why_not("linear_logprob", impl, CPU) is None]


def inputs(N=37, D=16, V=53, dtype=torch.float64, bias=True):
    g = torch.Generator().manual_seed(N + V)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    y = torch.randint(0, V, (N,), generator=g)
    return randn(N, D), randn(V, D), y, randn(V) if bias else None


def run(h, w, y, b, impl, need=(True, True, True), **kwargs):
    """(outputs, gradients of what needs one, plan) for fixed upstream gradients."""
    h, w, b = (
        None if x is None else x.clone().requires_grad_(n)
        for x, n in zip((h, w, b), need, strict=True)
    )
    out = fg.linear_logprob(h, w, y, bias=b, impl=impl, **kwargs)
    results = [out.logp] if out.entropy is None else [out.logp, out.entropy]
    loss = sum((x * torch.arange(1.0, len(x) + 1).cos()).sum() for x in results)
    leaves = [x for x in (h, w, b) if x is not None and x.requires_grad]
    return results, list(torch.autograd.grad(loss, leaves)), out.plan


def naive(h, w, y, b, temperature, softcap, scale):
    z = (h @ w.T + (0 if b is None else b)) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    T = temperature if isinstance(temperature, float) else temperature[:, None]
    logp = (z / T).log_softmax(1)
    kept = y != -100
    return (
        logp.gather(1, y.clamp(min=0)[:, None])[:, 0] * kept,
        -(logp.exp() * logp).sum(1) * kept,
    )


MATRIX = list(itertools.product((False, True), (0.7, "token"), (None, 4.0), (1.0, 0.3)))


@pytest.mark.parametrize("bias,temperature,softcap,scale", MATRIX)
def test_reference_is_the_definition(bias, temperature, softcap, scale):
    h, w, y, b = inputs(bias=bias)
    y[::5] = -100
    T = torch.rand(len(y), dtype=h.dtype) + 0.5 if temperature == "token" else temperature
    out = fg.linear_logprob(
        *(h, w, y),
        bias=b,
        temperature=T,
        softcap=softcap,
        logit_scale=scale,
        outputs=("logp", "entropy"),
        impl="reference",
    )
    logp, entropy = naive(h, w, y, b, T, softcap, scale)
    torch.testing.assert_close(out.logp, logp, rtol=0, atol=1e-13)
    torch.testing.assert_close(out.entropy, entropy, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bias,temperature,softcap,scale", MATRIX)
def test_every_plan_equals_the_reference_in_float64(bias, temperature, softcap, scale):
    h, w, y, b = inputs(bias=bias)
    y[::5] = -100
    T = torch.rand(len(y), dtype=h.dtype) + 0.5 if temperature == "token" else temperature
    plans = set()
    for entropy, workspace, need_w, need_h in itertools.product(
        (0, 1), (None, 0.003), (0, 1), (0, 1)
    ):
        if not (need_w or need_h):
            continue
        kwargs = {"temperature": T, "softcap": softcap, "logit_scale": scale}
        kwargs["outputs"] = ("logp", "entropy") if entropy else ("logp",)
        need = (bool(need_h), bool(need_w), bool(need_w))
        want, want_grads, _ = run(h, w, y, b, "reference", need, **kwargs)
        got, grads, plan = run(h, w, y, b, "torch", need, workspace_mb=workspace, **kwargs)
        plans.add(plan)
        for a, e in zip(got + grads, want + want_grads, strict=True):
            assert relative_error(a, e) < 1e-12, (plan, kwargs["outputs"], need)
    assert plans == {"frozen", "keep", "recompute"}


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [None, 0.01])
def test_error_budget(impl, dtype, workspace):
    h, w, y, b = inputs(61, 64, 257, dtype)
    kwargs = {"outputs": ("logp", "entropy"), "workspace_mb": workspace}
    ours, grads, _ = run(h, w, y, b, impl, **kwargs)
    args64 = (h.double(), w.double(), y, b.double())
    want, want_grads, _ = run(*args64, "reference", outputs=("logp", "entropy"))

    def plain(h, w, b):
        z = (h @ w.T + b).float()
        logp = z.log_softmax(1)
        return logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(1)

    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    same = plain(*leaves)
    loss = sum((x * torch.arange(1.0, len(x) + 1).cos()).sum() for x in same)
    same_grads = torch.autograd.grad(loss, leaves)
    names = ("logp", "entropy", "dhidden", "dweight", "dbias")
    every = zip(names, ours + grads, want + want_grads, [*same, *same_grads], strict=True)
    for name, a, e, s in every:
        # The entropy is a difference of two terms of the size of the log-prob.
        factor = 4.0 if name == "entropy" else 2.0
        assert_within_budget(a, e, s, factor=factor, what=f"{impl} {dtype} {name}")


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_bfloat16_accuracy_gates(impl):
    """Issue: log-prob error <= 2e-4, dX <= 2.5e-3, dW <= 3e-3 relative, from bf16 inputs."""
    h, w, y, _ = inputs(256, 256, 4096, torch.bfloat16, bias=False)
    w = w * (3 / 16)
    got, grads, _ = run(h, w, y, None, impl)
    want, want_grads, _ = run(h.double(), w.double(), y, None, "reference")
    assert (got[0] - want[0]).abs().max() <= 2e-4
    assert relative_error(grads[0], want_grads[0]) <= 2.5e-3
    assert relative_error(grads[1], want_grads[1]) <= 3e-3


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_gradient_of_a_certain_token(impl):
    """p > 1 - 1e-7: z_y - logsumexp would lose it all in float32."""
    h = torch.tensor([[17.0, 1.0], [25.0, -1.0], [60.0, 0.5]])
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.5]])
    y = torch.zeros(3, dtype=torch.int64)
    got, grads, _ = run(h, w, y, None, impl)
    want, want_grads, _ = run(h.double(), w.double(), y, None, "reference")
    assert (want[0] > -1e-6).all() and (want[0] < 0).all()
    for a, e in zip(got + grads, want + want_grads, strict=True):
        ratio = a.double()[e != 0] / e[e != 0]
        assert (ratio - 1).abs().max() < 0.01


@pytest.mark.parametrize("late", [False, True])  # a GPU looks for overflow after the last chunk
@pytest.mark.parametrize("impl", FAST)
def test_unlikely_targets_take_the_safe_path(impl, late, monkeypatch):
    if late:
        for module in (head, logprob):
            monkeypatch.setattr(module, "looks_at_each_chunk", lambda device: False)
    h = torch.tensor([[100.0], [300.0], [5000.0], [1.0]])
    w = torch.tensor([[1.0], [0.5], [-0.5], [0.99]])
    y = torch.tensor([2, 2, 2, 1])  # the first three lie 150, 450, 7500 below the maximum
    for plan_ws in (None, 1e-9):
        kwargs = {"outputs": ("logp", "entropy"), "workspace_mb": plan_ws}
        got, grads, _ = run(h, w, y, None, impl, **kwargs)
        want, want_grads, _ = run(
            h.double(), w.double(), y, None, "reference", outputs=("logp", "entropy")
        )
        for a, e in zip(got + grads, want + want_grads, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)
    out = fg.linear_logprob(h, w, y, impl=impl)
    assert int(out.overflow) == 3


def test_hostile_row_leaves_the_others_bitwise():
    h, w, y, _ = inputs(8, 16, 53, torch.float32, bias=False)
    clean = fg.linear_logprob(h, w, y).logp
    for value in (torch.nan, torch.inf, 1e30):
        spoilt = h.clone()
        spoilt[3, 5] = value
        logp = fg.linear_logprob(spoilt, w, y).logp
        others = torch.arange(8) != 3
        assert torch.equal(logp[others], clean[others])
        assert logp[3].isnan() or value == 1e30


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_impossible_vocabulary_entries(impl):
    h, w, y, b = inputs(dtype=torch.float32)
    b[7:20] = -torch.inf
    y = torch.where((y >= 7) & (y < 20), 0, y)
    got, grads, _ = run(h, w, y, b, impl, outputs=("logp", "entropy"))
    assert all(x.isfinite().all() for x in got + grads)
    assert (grads[1][7:20] == 0).all() and (grads[2][7:20] == 0).all()
    kept = torch.tensor([j for j in range(53) if not 7 <= j < 20])
    new = torch.full((53,), -1)
    new[kept] = torch.arange(len(kept))
    want, _, _ = run(h, w[kept], new[y], b[kept], "reference", outputs=("logp", "entropy"))
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_impossible_target(impl):
    h, w, y, b = inputs(4, 8, 11, torch.float32)
    b[int(y[1])] = -torch.inf
    logp = fg.linear_logprob(h, w, y, bias=b, impl=impl).logp
    assert logp[1] == -torch.inf
    assert logp[y != y[1]].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("N,V", [(0, 5), (1, 1), (1, 7), (3, 1)])
def test_smallest_shapes(impl, N, V):
    h, w = torch.randn(N, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    out = fg.linear_logprob(
        h, w, torch.zeros(N, dtype=torch.int64), outputs=("logp", "entropy"), impl=impl
    )
    (out.logp.sum() + out.entropy.sum()).backward()
    assert out.logp.shape == out.entropy.shape == (N,)
    assert h.grad.isfinite().all() and w.grad.isfinite().all()
    if V == 1:
        assert (out.logp == 0).all() and (h.grad == 0).all()


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_all_ignored(impl):
    h, w, _, _ = inputs(6, 4, 9, torch.float32)
    h[2] = torch.nan  # never read
    got, grads, _ = run(h, w, torch.full((6,), -100), None, impl, outputs=("logp", "entropy"))
    for x in (*got, *grads):
        assert (x == 0).all()


@pytest.mark.parametrize("impl", FAST)
def test_strided_inputs_and_gradients(impl):
    h, w, y, b = inputs(dtype=torch.float32)
    wide = torch.zeros(74, 48)
    wide[::2, ::3] = h
    y2 = torch.stack([y, y], 1)[:, 0]
    want, want_grads, _ = run(h, w, y, b, impl)
    for hidden, weight in ((wide[::2, ::3], w.T.contiguous().T), (h.T.contiguous().T, w)):
        hidden, weight = hidden.detach(), weight.detach()
        got, grads, _ = run(hidden, weight, y2, b, impl)
        for a, e in zip(got + grads, want + want_grads, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    hidden = h.clone().requires_grad_()
    fg.linear_logprob(hidden, w, y, impl=impl).logp.sum().backward()  # stride-0 gradient
    again = h.clone().requires_grad_()
    (fg.linear_logprob(again, w, y, impl=impl).logp * torch.ones(len(y))).sum().backward()
    assert torch.equal(hidden.grad, again.grad)


@pytest.mark.parametrize("impl", FAST)
def test_same_call_is_bitwise_the_same(impl):
    """Old and new log-probs of the same weights are equal, so the first ratio is exactly 1."""
    h, w, y, _ = inputs(100, 32, 301, torch.float32, bias=False)
    with torch.no_grad():
        old = fg.linear_logprob(h, w, y, impl=impl).logp
    for need in ((True, True, True), (True, False, False)):
        got, _, _ = run(h, w, y, None, impl, need)
        assert torch.equal(got[0], old)


def test_gradcheck():
    h, w, y, b = inputs(5, 3, 7)
    y[2] = -100
    for workspace, softcap in ((None, None), (1e-9, 3.0)):

        def both(h, w, b, workspace=workspace, softcap=softcap):
            out = fg.linear_logprob(
                *(h, w, y),
                bias=b,
                temperature=0.8,
                softcap=softcap,
                outputs=("logp", "entropy"),
                workspace_mb=workspace,
            )
            return out.logp, out.entropy

        leaves = [x.clone().requires_grad_() for x in (h, w, b)]
        assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("plan", ["forward", "frozen", "keep", "recompute"])
def test_opcheck(plan):
    h, w, y, b = inputs(6, 4, 9, torch.float32)
    y[1] = -100
    grad = plan != "forward"
    args = (
        h.requires_grad_(grad),
        w.requires_grad_(grad and plan != "frozen"),
        b,
        y,
        torch.full((6,), 0.5),
        None,
        1.0,
        "torch",
        None,
        "",
        plan != "frozen",
        plan,
    )
    torch.library.opcheck(linear_logprob_op, args)


def test_fullgraph():
    h, w, y, _ = inputs(6, 4, 9, torch.float32, bias=False)
    h.requires_grad_(), w.requires_grad_()

    def loss(h, w):
        out = fg.linear_logprob(h, w, y, outputs=("logp", "entropy"))
        return out.logp.sum() + out.entropy.sum()

    want = torch.autograd.grad(loss(h, w), (h, w))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(h, w), (h, w))
    for a, e in zip(got, want, strict=True):
        assert torch.equal(a, e)


def test_entropy_without_gradient_keeps_two_matmuls():
    h, w, y, _ = inputs(dtype=torch.float32, bias=False)
    h.requires_grad_()
    out = fg.linear_logprob(h, w, y, outputs=("logp", "entropy"), entropy_grad=False)
    assert out.plan == "frozen" and not out.entropy.requires_grad
    assert 0 <= float(out.entropy.min()) and float(out.entropy.max()) <= math.log(53) + 1e-5


def test_errors_name_the_argument_and_the_row():
    h, w, y, b = inputs(dtype=torch.float32)
    bad = y.clone()
    bad[4] = 53
    cases = [
        ("targets: row 4 is 53", (h, w, bad), {}),
        ("targets: row 4 is -1", (h, w, torch.where(bad == 53, -1, bad)), {}),
        ("hidden: expected shape", (h[0], w, y), {}),
        ("weight: expected shape", (h, w[:, :3], y), {}),
        ("weight: expected dtype", (h, w.double(), y), {}),
        ("targets: expected shape", (h, w, y[:-1]), {}),
        ("targets: expected dtype", (h, w, y.float()), {}),
        ("bias: expected shape", (h, w, y), {"bias": b[:-1]}),
        ("temperature: expected a finite number > 0", (h, w, y), {"temperature": 0.0}),
        ("temperature: expected a finite number > 0", (h, w, y), {"temperature": math.nan}),
        ("temperature: row 2", (h, w, y), {"temperature": torch.arange(37) - 2.0}),
        ("softcap: expected", (h, w, y), {"softcap": -1.0}),
        ("outputs: expected one of", (h, w, y), {"outputs": ("logits",)}),
        ("impl: linear_logprob has", (h, w, y), {"impl": "fast"}),
        ("impl: linear_logprob cannot run as 'cpp'", (h.double(), w.double(), y), {"impl": "cpp"}),
    ]
    for message, args, kwargs in cases:
        if message.startswith("temperature: row 2"):
            kwargs["temperature"][0:2] = 1.0
        with pytest.raises(fg.InputError, match=message.replace("(", r"\(")):
            fg.linear_logprob(*args, **kwargs)


@pytest.mark.parametrize("impl", FAST)
def test_no_clip_flag_differs_from_float64_on_bfloat16_inputs(impl):
    """1e5 tokens whose float64 ratio is at least 1e-3 from a clip edge."""
    n, d, v = 100_000, 16, 64
    h, w, y, _ = inputs(n, d, v, torch.bfloat16, bias=False)
    with torch.no_grad():
        exact = fg.linear_logprob(h.double(), w.double(), y, impl="torch").logp
        ours = fg.linear_logprob(h, w, y, impl=impl).logp
    ratio = torch.rand(n, dtype=torch.float64) + 0.5
    away = ((ratio - 0.8).abs() > 1e-3) & ((ratio - 1.2).abs() > 1e-3)
    old, A = exact - ratio.log(), torch.where(torch.rand(n) > 0.5, 1.0, -1.0)
    flags = []
    for logp in (exact, ours):
        leaf = logp[away].requires_grad_()
        kwargs = {"seq_ids": torch.arange(len(leaf)), "old_logp": old[away].to(leaf.dtype)}
        loss = fg.grpo_loss(leaf, A[away].to(leaf.dtype), fg.Objective("dapo"), **kwargs).loss
        flags.append(torch.autograd.grad(loss, leaf)[0] == 0)
    assert torch.equal(*flags) and 0.1 < flags[0].float().mean() < 0.9
