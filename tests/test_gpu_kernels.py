# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the loss and the rewards on a GPU: real sizes, repeats, 64-bit offsets."""

import pytest
import torch

pytest.importorskip("triton")

import fastgrpo as fg
from fastgrpo.losses.tokens import segment_sum
from fastgrpo.ops.linear.offset_exp import offset_exp as reference_offset_exp
from fastgrpo.reference.linear_logprob import linear_logprob as reference_logprob
from fastgrpo.testing import relative_error

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
VOCABULARY, CHUNK = 151936, 4096  # Qwen2.5-VL's head and the default chunk
REPEATS = 250
MANY = 262_144
LONG = 131_072


@pytest.fixture(autouse=True)
def _generator():
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)


def chunk(C, V):
    logits = torch.randn(C, V, device=DEVICE).mul_(3)
    targets = torch.randint(V, (C,), device=DEVICE)
    logits[torch.arange(C, device=DEVICE), targets] += 6
    return logits, targets


def streaming_pass(logits, targets, **options):
    from fastgrpo_kernels.offset_exp import offset_exp

    return offset_exp(logits, targets, **options)


def test_offset_exp_at_real_size_bf16_in_place_equals_fp32_rounded():
    """Every element of every row: a store that destroyed a logit before its load would show."""
    logits, targets = chunk(CHUNK, VOCABULARY)
    wide = streaming_pass(logits.clone(), targets, entropy=True)
    narrow = streaming_pass(logits.clone(), targets, entropy=True, exp_dtype=torch.bfloat16)
    assert torch.equal(narrow.exps, wide.exps.bfloat16())
    for name in ("sum_exp", "target_logit", "moment", "overflow"):
        assert torch.equal(getattr(narrow, name), getattr(wide, name))
    some = slice(None, None, max(1, CHUNK // 64))
    want = reference_offset_exp(logits[some].double(), targets[some], entropy=True)
    logp = -torch.log1p(wide.sum_exp[some].double())
    assert float((logp + torch.log1p(want.sum_exp)).abs().max()) <= 2e-5
    entropy = torch.log1p(want.sum_exp) - want.moment / (1 + want.sum_exp)
    ours = torch.log1p(wide.sum_exp) - wide.moment / (1 + wide.sum_exp)
    assert float((ours[some].double() - entropy).abs().max()) <= 1e-4


def test_offset_exp_repeats_bitwise():
    logits, targets = chunk(CHUNK // 8, VOCABULARY)
    work = logits.clone()
    first = None
    for _ in range(REPEATS):
        work.copy_(logits)
        out = streaming_pass(work, targets, entropy=True, exp_dtype=torch.bfloat16)
        if first is None:
            first = [x.clone() for x in out]
        assert all(torch.equal(x, y) for x, y in zip(out, first, strict=True))


@pytest.mark.parametrize("exp_dtype", [torch.float32, torch.bfloat16])
def test_offset_exp_beyond_2_31_elements(exp_dtype):
    """Rows do not depend on one another, so the last ones equal the same rows on their own."""
    C = 2**31 // VOCABULARY + 9
    logits, targets = chunk(C, VOCABULARY)
    tail = logits[-8:].clone()
    big = streaming_pass(logits, targets, entropy=True, exp_dtype=exp_dtype)
    small = streaming_pass(tail, targets[-8:], entropy=True, exp_dtype=exp_dtype)
    for x, y in zip(big, small, strict=True):
        assert torch.equal(x[-8:], y)


def test_offset_exp_rows_2_31_elements_apart():
    stride, V = 2**30 + 16, 1000
    memory = torch.zeros(2 * stride + V, device=DEVICE)
    view = memory.as_strided((3, V), (stride, 1))
    logits, targets = chunk(3, V)
    view.copy_(logits)
    far = streaming_pass(view, targets, exp_dtype=torch.bfloat16)
    near = streaming_pass(logits, targets, exp_dtype=torch.bfloat16)
    assert torch.equal(far.exps, near.exps) and torch.equal(far.sum_exp, near.sum_exp)


def tokens(lengths, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    counts = torch.tensor(lengths, device=DEVICE)
    seq_ids = torch.repeat_interleave(torch.arange(len(lengths), device=DEVICE), counts)
    N = len(seq_ids)
    logp = -3 * torch.rand(N, device=DEVICE, generator=g)
    streams = {
        name: logp + scale * torch.randn(N, device=DEVICE, generator=g)
        for name, scale in (("old_logp", 0.2), ("ref_logp", 0.5), ("rollout_logp", 0.2))
    }
    mask = torch.rand(N, device=DEVICE, generator=g) > 0.1
    advantages = torch.randn(len(lengths), device=DEVICE, generator=g)
    return logp, advantages, {"seq_ids": seq_ids, "mask": mask, **streams}


@pytest.mark.parametrize("lengths", [(1,), (LONG,), (LONG // 2 + 1, 3, LONG // 3), "many"])
@pytest.mark.parametrize("obj", [fg.Objective("dapo", beta=0.04), fg.Objective("grpo", "sequence")])
def test_grpo_loss_long_rows(lengths, obj):
    lengths = [MANY // 256] * 256 if lengths == "many" else lengths
    logp, advantages, rest = tokens(lengths)
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rest.items()}
        x = logp.to(dtype).requires_grad_()
        out = fg.grpo_loss(x, advantages.to(dtype), obj, impl=impl, **cast)
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, x)[0], out.metrics))
    (loss, grad, metrics), (want_loss, want_grad, want_metrics) = results
    assert relative_error(grad, want_grad) <= 1e-5
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    for name, value in want_metrics.items():
        torch.testing.assert_close(metrics[name].double(), value, rtol=1e-4, atol=1e-5)


def test_grpo_loss_repeats_bitwise():
    logp, advantages, rest = tokens([1000, 1, 37] * 40)
    obj = fg.Objective("grpo", "sequence", beta=0.04)
    first = None
    for _ in range(REPEATS):
        x = logp.clone().requires_grad_()
        out = fg.grpo_loss(x, advantages, obj, impl="triton", **rest)
        (grad,) = torch.autograd.grad(out.loss, x)
        result = (out.loss.detach(), grad, out.stats)
        first = result if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


def head(N, D, V, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(N, D, device=DEVICE, generator=g).bfloat16()
    weight = (torch.randn(V, D, device=DEVICE, generator=g) * 3 / D**0.5).bfloat16()
    targets = torch.randint(V, (N,), device=DEVICE, generator=g)
    return hidden, weight, targets


def test_linear_grpo_loss_bf16_accuracy():
    N, D, V = 2048, 512, 32768
    hidden, weight, targets = head(N, D, V)
    seq_ids = torch.arange(N, device=DEVICE) // 128
    advantages = torch.randn(N // 128, device=DEVICE)
    want_logp, _ = reference_logprob(hidden.double(), weight.double(), targets)
    old = (want_logp + 0.1 * torch.randn(N, device=DEVICE)).float()
    results = []
    for impl, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        x, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
        obj = fg.Objective("dapo")
        rest = {"seq_ids": seq_ids, "old_logp": old, "impl": impl}
        out = fg.linear_grpo_loss(x, w, targets, advantages, obj, **rest)
        results.append((out.logp, *torch.autograd.grad(out.loss, (x, w))))
    (logp, dx, dw), (_, want_dx, want_dw) = results
    assert float((logp.double() - want_logp).abs().max()) <= 2e-4
    assert relative_error(dx, want_dx) <= 2.5e-3
    assert relative_error(dw, want_dw) <= 3e-3


def test_linear_grpo_loss_has_no_wrong_clip_flag():
    """1e5 tokens whose float64 ratio is at least 1e-3 from a clip edge."""
    N, D, V = 100_000, 64, 4096
    hidden, weight, targets = head(N, D, V)
    logp = fg.linear_logprob(hidden, weight, targets, impl="triton").logp
    want = torch.cat(
        [
            reference_logprob(
                hidden[i : i + 8192].double(), weight.double(), targets[i : i + 8192]
            )[0]
            for i in range(0, N, 8192)
        ]
    )
    old = want + 0.2 * torch.randn(N, device=DEVICE, dtype=torch.float64)
    ratio, ours = (want - old).exp(), (logp.double() - old).exp()
    for edge in (0.8, 1.2):
        clear = (ratio - edge).abs() >= 1e-3
        assert not bool((((ratio > edge) != (ours > edge)) & clear).any())


def test_linear_grpo_loss_first_ratio_is_exactly_one():
    hidden, weight, targets = head(1000, 256, VOCABULARY)
    old = fg.linear_logprob(hidden, weight, targets, impl="triton").logp
    out = fg.linear_grpo_loss(
        hidden,
        weight,
        targets,
        torch.randn(10, device=DEVICE),
        fg.Objective("grpo"),
        seq_ids=torch.arange(1000, device=DEVICE) // 100,
        old_logp=old,
        impl="triton",
    )
    assert float(out.metrics["ratio/min"]) == 1.0 == float(out.metrics["ratio/max"])


def test_linear_grpo_loss_kept_equals_chunks_and_repeats_bitwise():
    hidden, weight, targets = head(3000, 256, 32768)
    rest = {"seq_ids": torch.arange(3000, device=DEVICE) // 100, "impl": "triton"}
    advantages = torch.randn(30, device=DEVICE)
    found = {}
    for plan, workspace in (("keep", 1e4), ("one_pass", 150.0), ("keep", 1e4)):
        x, w = (t.clone().requires_grad_() for t in (hidden, weight))
        obj = fg.Objective("grpo", "sequence")
        out = fg.linear_grpo_loss(x, w, targets, advantages, obj, workspace_mb=workspace, **rest)
        result = (out.logp, *torch.autograd.grad(2.0 * out.loss, (x, w)))
        assert out.plan == plan
        for ours, first in zip(result, found.setdefault(plan, result), strict=True):
            assert torch.equal(ours, first)
    for kept, chunked in zip(found["keep"], found["one_pass"], strict=True):
        assert relative_error(kept, chunked) <= 4e-3


def test_group_advantages_unread_on_the_host():
    rewards = torch.randn(12, device=DEVICE)
    rewards[5] = torch.inf
    sizes = torch.tensor([4, 4], device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = fg.group_advantages(rewards, 4)
        wrong = fg.group_advantages(rewards, sizes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ours[4:8].isnan().all() and ours[:4].isfinite().all() and wrong.isnan().all()


@pytest.mark.parametrize("shape", [(300, 520, 32768), (4096, 2048, 151936)])
def test_linear_exp_equals_the_streaming_pass(shape):
    from fastgrpo_kernels.linear_exp import linear_exp

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs Hopper")
    hidden, weight, targets = head(*shape)
    scale = torch.rand(len(hidden), device=DEVICE) + 0.5
    exps = torch.empty(len(hidden), len(weight), device=DEVICE, dtype=torch.bfloat16)
    S, c, zy = linear_exp(hidden, weight, targets, scale, exps)
    logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    want = streaming_pass(logits, targets, inv_temperature=scale)
    shift = (c - zy) * scale
    logp = -shift - torch.log1p(S + torch.expm1(-shift))
    assert float((logp + torch.log1p(want.sum_exp)).abs().max()) <= 2e-4


@pytest.mark.parametrize("N", [1, MANY])
def test_linear_grpo_loss_token_counts(N):
    hidden, weight, targets = head(N, 64, 1021)
    x = hidden.requires_grad_()
    seq_ids = torch.arange(N, device=DEVICE) // 1024
    advantages = torch.randn(int(seq_ids[-1]) + 1, device=DEVICE)
    rest = {"seq_ids": seq_ids, "impl": "triton"}
    out = fg.linear_grpo_loss(x, weight, targets, advantages, fg.Objective("grpo"), **rest)
    out.loss.backward()
    means = segment_sum(torch.ones(N, device=DEVICE), seq_ids, len(advantages))
    assert bool((means > 0).all()) and bool(x.grad.isfinite().all())
    want = reference_logprob(hidden[-64:].detach().double(), weight.double(), targets[-64:])[0]
    assert float((out.logp[-64:].double() - want).abs().max()) <= 2e-4


def test_linear_kl_bf16_accuracy():
    p, w, _ = head(512, 256, VOCABULARY)
    q = (p.float() + 0.1 * torch.randn(512, 256, device=DEVICE)).bfloat16()
    results = []
    for impl, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        # Two heads: the gradients of a shared one would cancel into each other's rounding.
        leaves = [x.to(dtype).requires_grad_() for x in (p[:64], w.clone(), q[:64], w.clone())]
        kl = fg.linear_kl(*leaves, impl=impl)
        results.append((kl.detach(), *torch.autograd.grad(kl.sum(), leaves)))
    (kl, *grads), (want, *want_grads) = results
    torch.testing.assert_close(kl.double(), want, rtol=1e-4, atol=1e-5)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert relative_error(grad, want_grad) <= 5e-3


def test_group_advantages_of_a_million_groups():
    rewards = torch.randn(8 * 2**20, device=DEVICE)
    rewards[:8] = 100.1
    ours = fg.group_advantages(rewards, 8, impl="triton")
    want = fg.group_advantages(rewards.double(), 8, impl="reference")
    torch.testing.assert_close(ours.double(), want, rtol=1e-6, atol=1e-6)
    assert not ours[:8].any()


def test_pairwise_box_iou_equals_the_cpu_bitwise():
    corner = torch.rand(512 * 100, 2) * 500
    boxes = torch.cat([corner, corner + torch.rand(512 * 100, 2) * 300], 1)
    sizes = [100] * 512
    shuffled = boxes[torch.randperm(len(boxes))]
    values, _ = fg.pairwise_box_iou(
        boxes.to(DEVICE), shuffled.to(DEVICE), sizes, sizes, impl="triton"
    )
    want, _ = fg.pairwise_box_iou(boxes, shuffled, sizes, sizes, impl="reference")
    assert torch.equal(values.cpu(), want)


def test_scalars_and_lengths_do_not_recompile():
    from fastgrpo_kernels.grpo_kernel import grpo_loss_kernel

    cache = grpo_loss_kernel.device_caches[torch.cuda.current_device()][0]
    sizes = []
    for N, epsilon, beta in ((1, 0.2, 0.04), (64, 0.1, 0.2), (1000, 0.3, 1.0)):
        logp, advantages, rest = tokens([N, 16])
        obj = fg.Objective("dapo", epsilon=epsilon, beta=beta)
        fg.grpo_loss(logp, advantages, obj, impl="triton", **rest)
        sizes.append(len(cache))
    assert sizes[0] == sizes[-1]
