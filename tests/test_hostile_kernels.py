# SPDX-License-Identifier: Apache-2.0
"""Hostile inputs of the loss ops, one row of a table each, with what is promised.

    value   a defined value: equal to plain PyTorch on the same inputs, gradients finite
    poison  the hostile row becomes NaN, every other row is bitwise what it was
    error   InputError whose message starts with the argument
    zero    exactly 0, and gradients exactly 0

Boxes have their own table. N rows, D hidden, V vocabulary.
"""

import math
import types

import pytest
import torch
import torch.nn.functional as F

import fastgrpo as fg
from fastgrpo.ops.linear.memory import chunk_rows

N, D, V = 6, 8, 21
ROW = 2  # the hostile row
INF, NAN = math.inf, math.nan


def head(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    h, w = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    return h.to(dtype), w.to(dtype), torch.randint(0, V, (N,), generator=g)


def logits_of(z, y, dtype, **kwargs):
    """linear_logprob whose logits are exactly z: hidden picks rows of a weight that holds them.

    Returns (logp, entropy, dz): hidden is the identity, so that dweight.T is the gradient of z.
    """
    hidden = torch.eye(len(z), dtype=dtype)
    weight = z.T.to(dtype).contiguous().requires_grad_()
    out = fg.linear_logprob(hidden, weight, y, outputs=("logp", "entropy"), **kwargs)
    (dz,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), weight)
    return out.logp.detach(), out.entropy.detach(), dz.T


# name -> (what happens to the row of logits, promise)
LOGITS = {
    "all equal": (lambda z: z.fill_(3.0), "value"),
    "one +1e4": (lambda z: z.index_fill_(0, torch.tensor([4]), 1e4), "value"),
    "offset +1e4": (lambda z: z.add_(1e4), "value"),
    "offset -1e4": (lambda z: z.sub_(1e4), "value"),
    "some -inf": (lambda z: z.index_fill_(0, torch.tensor([4, 5, 9]), -INF), "value"),
    "only -inf beside the target": (lambda z: z[1:].fill_(-INF), "value"),
    "subnormal": (lambda z: z.fill_(1e-40), "value"),
    "+inf": (lambda z: z.index_fill_(0, torch.tensor([4]), INF), "poison"),
    "NaN": (lambda z: z.index_fill_(0, torch.tensor([4]), NAN), "poison"),
    "all -inf": (lambda z: z.fill_(-INF), "poison"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LOGITS)
def test_logits(case, dtype):
    change, promise = LOGITS[case]
    g = torch.Generator().manual_seed(1)
    clean = torch.randn(N, V, generator=g).to(dtype)
    y = torch.zeros(N, dtype=torch.int64)
    z = clean.clone()
    change(z[ROW])
    others = torch.arange(N) != ROW
    if not z.isfinite().all():
        return _infinite_logits(promise, clean, z, y, dtype)
    logp, entropy, dz = logits_of(z, y, dtype)
    want = z.double().log_softmax(1)
    H = -torch.special.entr(want.exp()).sum(1).neg()
    torch.testing.assert_close(logp.double(), want[:, 0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy.double(), H, rtol=1e-4, atol=2e-3)
    assert dz.isfinite().all()
    base_logp, _, _ = logits_of(clean, y, dtype)
    assert torch.equal(logp[others], base_logp[others])


def _infinite_logits(promise, clean, z, y, dtype):
    """A product cannot make one row infinite alone: its result is put there in its place."""
    from fastgrpo.ops.linear.head import Head

    out = {}
    for name, rows in (("clean", clean), ("hostile", z)):
        made = Head(torch.zeros(V, 1, dtype=dtype), None, None, 1.0, "torch")
        held = rows.to(made.acc_dtype)
        made.logits = types.MethodType(
            lambda self, x, out, held=held: out.copy_(held[x[:, 0].long()]), made
        )
        x = torch.arange(N, dtype=made.acc_dtype)[:, None]
        c = made.chunk(x, y, None, made.buffer(N), True)
        E, v = made.weigh(c, y, None, torch.ones(N), torch.ones(N), in_place=True)
        out[name] = c.logp, c.entropy, E * v[:, None]
    others = torch.arange(N) != ROW
    for a, b in zip(out["hostile"], out["clean"], strict=True):
        assert torch.equal(a[others], b[others])
    logp, entropy, dz = out["hostile"]
    if promise == "poison":
        assert logp[ROW].isnan()
        return
    want = z[ROW].double().log_softmax(0)
    torch.testing.assert_close(logp[ROW].double(), want[0], rtol=1e-5, atol=1e-5)
    impossible = z[ROW] == -INF
    assert entropy[ROW].isfinite() and dz[ROW].isfinite().all()
    assert (dz[ROW][impossible] == 0).all()


HIDDEN = {"NaN": NAN, "+inf": INF, "-inf": -INF}


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_row(case, impl):
    h, w, y = head()
    clean = fg.linear_logprob(h, w, y, outputs=("logp", "entropy"), impl=impl)
    spoilt = h.clone()
    spoilt[ROW, 1] = HIDDEN[case]
    spoilt.requires_grad_()
    out = fg.linear_logprob(spoilt, w, y, outputs=("logp", "entropy"), impl=impl)
    (out.logp + out.entropy).sum().backward()
    others = torch.arange(N) != ROW
    assert torch.equal(out.logp[others], clean.logp[others])
    assert torch.equal(out.entropy[others], clean.entropy[others])
    assert out.logp[ROW].isnan() and spoilt.grad[others].isfinite().all()


TARGETS = {
    "all masked": (torch.full((N,), -100), "zero"),
    "one scored": (torch.tensor([-100, -100, 3, -100, -100, -100]), "value"),
    "alternating": (torch.tensor([0, -100, 1, -100, 2, -100]), "value"),
    "none masked": (torch.arange(N), "value"),
    "V": (torch.tensor([0, 0, V, 0, 0, 0]), "targets: row 2 is 21"),
    "V + 5": (torch.tensor([0, 0, 0, V + 5, 0, 0]), "targets: row 3 is 26"),
    "-1": (torch.tensor([-1, 0, 0, 0, 0, 0]), "targets: row 0 is -1"),
    "-101": (torch.tensor([0, -101, 0, 0, 0, 0]), "targets: row 1 is -101"),
    "int64 limit": (torch.tensor([0, 0, 0, 0, 0, 2**63 - 1]), "targets: row 5"),
    "int32": (torch.arange(N, dtype=torch.int32), "value"),
    "float": (torch.arange(N, dtype=torch.float32), "targets: expected dtype"),
    "two-dimensional": (torch.zeros(N, 1, dtype=torch.int64), "targets: expected shape"),
}


@pytest.mark.parametrize("op", ["linear_logprob", "linear_grpo_loss"])
@pytest.mark.parametrize("case", TARGETS)
def test_targets(case, op):
    y, promise = TARGETS[case]
    h, w, _ = head()
    h.requires_grad_(), w.requires_grad_()

    def run():
        if op == "linear_logprob":
            out = fg.linear_logprob(h, w, y)
            return out.logp, out.logp.sum()
        A, ids = torch.ones(1), torch.zeros(N, dtype=torch.int64)
        out = fg.linear_grpo_loss(h, w, y, A, fg.Objective("dapo"), seq_ids=ids)
        return out.logp, out.loss

    if promise not in ("zero", "value"):
        with pytest.raises(fg.InputError, match=promise):
            run()
        return
    logp, loss = run()
    loss.backward()
    want = (h @ w.T).log_softmax(1).gather(1, y.long().clamp(min=0)[:, None])[:, 0] * (y >= 0)
    torch.testing.assert_close(logp, want)
    assert h.grad.isfinite().all() and (h.grad[y == -100] == 0).all()
    assert promise != "zero" or ((logp == 0).all() and (w.grad == 0).all())


@pytest.mark.parametrize("target", [-1, V, V + 5, 2**62])
def test_unchecked_wrong_target_is_nan_in_its_row(target):
    h, w, y = head()
    clean = fg.linear_logprob(h, w, y).logp
    y[ROW] = target
    h.requires_grad_()
    out = fg.linear_logprob(h, w, y, outputs=("logp", "entropy"), validate=False)
    (out.logp + out.entropy).sum().backward()
    others = torch.arange(N) != ROW
    assert out.logp[ROW].isnan() and torch.equal(out.logp[others], clean[others])
    assert h.grad[others].isfinite().all()


SHAPES = {
    "N=0": (0, D, V), "V=1": (N, D, 1), "V=2": (N, D, 2), "odd V": (N, D, 33), "odd D": (N, 7, V),
    "D=1": (N, 1, V), "N=1": (1, D, V), "prime": (13, 11, 31), "all one": (1, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case):
    n, d, v = SHAPES[case]
    h, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    y = torch.arange(n) % v
    out = fg.linear_logprob(h, w, y, outputs=("logp", "entropy"))
    got = torch.autograd.grad((out.logp + out.entropy).sum(), (h, w))
    logp = (h @ w.T).log_softmax(1)
    want = logp.gather(1, y[:, None])[:, 0] - (logp.exp() * logp).sum(1)
    for a, e in zip(got, torch.autograd.grad(want.sum(), (h, w)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def _views(x):
    """The same values under other strides."""
    wide = torch.full_like(torch.cat([x, x]), NAN if x.is_floating_point() else 7)
    wide[::2] = x
    found = {"strided": wide[::2]}
    if x.dim() == 2:
        found["transposed"] = x.T.contiguous().T
        padded = torch.full((x.shape[0], x.shape[1] + 3), NAN, dtype=x.dtype)
        padded[:, 1:-2] = x
        found["sliced"] = padded[:, 1:-2]
    return found


VIEWS = ("strided", "transposed", "sliced")
LAYOUTS = [(arg, view) for arg in ("hidden", "weight") for view in VIEWS]
LAYOUTS += [(arg, "strided") for arg in ("targets", "advantages", "old_logp", "seq_ids")]


@pytest.mark.parametrize("arg,view", LAYOUTS)
def test_layout_does_not_matter(arg, view):
    h, w, y = head()
    args = {"hidden": h, "weight": w, "targets": y, "advantages": torch.randn(3)}
    args |= {"seq_ids": torch.arange(N) // 2, "old_logp": -torch.rand(N)}

    def run(args):
        leaves = [args[k].detach().requires_grad_() for k in ("hidden", "weight")]
        args = args | dict(zip(("hidden", "weight"), leaves, strict=True))
        loss = fg.linear_grpo_loss(obj=fg.Objective("grpo"), **args).loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for a, e in zip(run(args | {arg: _views(args[arg])[view]}), run(args), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


EXPANDED = {"hidden": 0, "weight": 1}


@pytest.mark.parametrize("arg", EXPANDED)
def test_stride_zero_input(arg):
    tensors = list(head())
    i = EXPANDED[arg]
    tensors[i] = tensors[i][:1].expand(tensors[i].shape)
    want = fg.linear_logprob(*[x.contiguous() for x in tensors]).logp
    assert torch.equal(fg.linear_logprob(*tensors).logp, want)


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("grad", ["stride 0", "strided"])
def test_gradient_layouts(need, grad):
    h, w, y = head()
    leaves = [h.requires_grad_(need[0]), w.requires_grad_(need[1])]
    out = fg.linear_logprob(h, w, y).logp
    g = torch.ones(1).expand(N) if grad == "stride 0" else torch.ones(2 * N)[::2]
    wanted = [x for x in leaves if x.requires_grad]
    got = torch.autograd.grad(out, wanted, g, retain_graph=True)
    for a, e in zip(got, torch.autograd.grad(out, wanted, torch.ones(N)), strict=True):
        assert torch.equal(a, e)


MISMATCH = {
    "weight: expected dtype": lambda h, w, y: (h, w.double(), y),
    "weight: expected shape": lambda h, w, y: (h, w[:, 1:], y),
    "hidden: expected shape": lambda h, w, y: (h[None], w, y),
    "hidden: expected a tensor": lambda h, w, y: (h.tolist(), w, y),
    "weight: expected device": lambda h, w, y: (h, w.to("meta"), y),
    "hidden: expected a floating": lambda h, w, y: (h.long(), w.long(), y),
    "weight: expected dtype .*, got torch.uint8": lambda h, w, y: (h, w.to(torch.uint8), y),
}


@pytest.mark.parametrize("message", MISMATCH)
def test_mismatch(message):
    with pytest.raises(fg.InputError, match=message):
        fg.linear_logprob(*MISMATCH[message](*head()))


HEADS = {
    "bias": {"bias": True}, "softcap": {"softcap": 3.0}, "logit_scale": {"logit_scale": 0.2},
    "T=0.1": {"temperature": 0.1}, "T=0.7": {"temperature": 0.7}, "T=2": {"temperature": 2.0},
    "T per token": {"temperature": torch.linspace(0.1, 2.0, N)},
    "everything": {"bias": True, "softcap": 3.0, "logit_scale": 0.2, "temperature": 0.7},
    "padded vocabulary": {"pad": 5},
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_heads(case):
    kwargs = dict(HEADS[case])
    h, w, y = head()
    bias = torch.randn(V) if kwargs.pop("bias", False) else None
    if pad := kwargs.pop("pad", 0):
        w = torch.cat([w, torch.zeros(pad, D)])
        bias = torch.cat([torch.zeros(V), torch.full((pad,), -INF)])
    logp = fg.linear_logprob(h, w, y, bias=bias, **kwargs).logp
    z = F.linear(h, w, bias) * kwargs.get("logit_scale", 1.0)
    if cap := kwargs.get("softcap"):
        z = cap * torch.tanh(z / cap)
    T = kwargs.get("temperature", 1.0)
    z = z / (T[:, None] if isinstance(T, torch.Tensor) else T)
    want = z.log_softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(logp, want, rtol=1e-5, atol=1e-5)


def test_tied_weight_gathers_both_gradients():
    _, w, y = head()
    w.requires_grad_()
    hidden = F.embedding(y, w).tanh()
    loss = fg.linear_logprob(hidden, w, y).logp.sum()
    (got,) = torch.autograd.grad(loss, w)
    z = (F.embedding(y, w).tanh() @ w.T).log_softmax(1).gather(1, y[:, None])
    (want,) = torch.autograd.grad(z.sum(), w)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_lora_head_trains_its_adapter():
    h, w, y = head()
    A, B = torch.randn(2, D, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    fg.linear_logprob(h, w + B @ A, y).logp.sum().backward()
    assert A.grad.abs().sum() > 0 and B.grad.abs().sum() > 0


def test_empty_zero3_shard_is_named():
    h, _, y = head()
    shard = torch.nn.Parameter(torch.empty(0))
    shard.ds_id = 7
    for op in (fg.linear_logprob, lambda *a: fg.linear_kl(*a[:2], h, a[1])):
        with pytest.raises(fg.InputError, match="weight: an empty ZeRO-3 shard"):
            op(h, shard, y)


BAD_SCALARS = [
    ("temperature", 0.0), ("temperature", -1.0), ("temperature", NAN), ("temperature", INF),
    ("temperature", "hot"), ("softcap", 0.0), ("softcap", NAN), ("logit_scale", 0.0),
]  # fmt: skip


@pytest.mark.parametrize("name,value", BAD_SCALARS)
def test_bad_scalars(name, value):
    with pytest.raises(fg.InputError, match=name):
        fg.linear_logprob(*head(), **{name: value})


@pytest.mark.parametrize("value", [0.0, -2.0, NAN])
def test_bad_temperature_row(value):
    T = torch.ones(N)
    T[4] = value
    with pytest.raises(fg.InputError, match="temperature: row 4"):
        fg.linear_logprob(*head(), temperature=T)


@pytest.mark.parametrize("op", ["linear_logprob", "linear_grpo_loss", "linear_kl"])
def test_more_than_two_to_the_31_elements(op):
    """Shapes only, on fake tensors: a 32-bit size anywhere would show."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    n, v = 2**17, 2**15 + 1
    with FakeTensorMode():
        h, w = torch.empty(n, 4, requires_grad=True), torch.empty(v, 4, requires_grad=True)
        if op == "linear_kl":
            args = (h, w, h, w, 1.0, None, "torch", [True, False])
            kl, kept, dropped = torch.ops.fastgrpo.linear_kl(*args)
            assert kl.shape == (n,) and dropped.shape == (0, v)
            assert kept.numel() == n * v > 2**31
            return
        y = torch.zeros(n, dtype=torch.int64)
        args = (h, w, None, y, None, None, 1.0, "torch", None, "", False, "keep")
        kept = torch.ops.fastgrpo.linear_logprob(*args)[2]
        assert kept.numel() == n * v > 2**31
    assert (
        1 <= chunk_rows(2**31, 10, 4, None, torch.device("cpu"))
        and chunk_rows(v, n, 4, None, torch.device("cpu")) * v < 2**31
    )
