# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, forward and backward, on shapes small enough for compute-sanitizer.

`python bench/sanitize.py [--device cpu]` runs them; `bench/sanitize.sh` runs them on a GPU under
memcheck and racecheck. Sizes straddle a tile or a warp, so that the masked edges are executed.
"""

import argparse
from collections.abc import Callable

import torch
from fastgrpo_kernels import linear_exp

import fastgrpo as fg
from fastgrpo.ops.gather_rows import gather_rows, row_index, sum_rows
from fastgrpo.ops.shared_prefix_attention import prefix_tables, shared_prefix_attention
from fastgrpo.packing.layout import GroupLayout


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def shared_prefix() -> None:
    segments = torch.tensor(GroupLayout([(131, [1, 0, 70]), (5, [129])]).segments)
    tables = prefix_tables(segments, heads=(30, 1), processors=132)  # keys cut into parts
    assert tables.slots
    half = torch.bfloat16 if tables.positions.is_cuda else torch.float32
    total = len(tables.positions)
    for head_dim in (8, 64, 80, 128, 256):
        for options in ({}, {"window": 33, "softcap": 20.0}):
            q, k, v = (_leaf(total, heads, head_dim, dtype=half) for heads in (2, 1, 1))
            shared_prefix_attention(q, k, v, tables, **options).sum().backward()


def rows() -> None:
    index = row_index(torch.tensor([3, 0, 3, 3, 6, 1, 6]), 8)
    gather_rows(_leaf(8, 1025), index).sum().backward()
    sum_rows(_leaf(7, 1025), index).sum().backward()


def projection() -> None:
    """bfloat16 goes over its float32 logits in place; the second vocabulary is of whole tiles."""
    targets = torch.arange(67)
    seq_ids = torch.arange(67) // 23
    advantages = torch.tensor([1.0, -1.0, 0.5])
    objectives = (
        (fg.Objective(loss_type="dapo", beta=0.04), {}),
        (fg.Objective(loss_type="grpo", entropy_coef=0.01), {"softcap": 20.0}),
    )
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary in (1031, 4096):
            head = _leaf(67, 48, dtype=dtype), _leaf(vocabulary, 48, dtype=dtype)
            options = {"outputs": ("logp", "entropy"), "workspace_mb": 0.05}  # several chunks
            out = fg.linear_logprob(*head, targets, **options)
            (out.logp.sum() + out.entropy.sum()).backward()
            for obj, more in objectives:
                more = {"seq_ids": seq_ids, "ref_logp": out.logp.detach() + 0.1, **more}
                fg.linear_grpo_loss(*head, targets, advantages, obj, **more).loss.backward()
            other = [x.detach() + 0.1 for x in head]
            fg.linear_kl(*head, *other).sum().backward()


def epilogue() -> None:
    """`projection` with the exponential in the logits' matmul, where the GPU can."""
    linear_exp.EPILOGUE = True
    try:
        projection()
    finally:
        linear_exp.EPILOGUE = False


def losses() -> None:
    logp = (-torch.rand(4500)).requires_grad_()
    seq_ids = (torch.arange(4500) >= 23).long() + (torch.arange(4500) >= 46)  # one in pieces
    advantages = torch.tensor([1.0, -1.0, 0.5])
    for loss_type in ("grpo", "dapo", "cispo", "gmpo"):
        obj = fg.Objective(loss_type=loss_type, beta=0.04)
        old, ref = (logp.detach() + 0.1 for _ in range(2))
        fg.grpo_loss(
            logp, advantages, obj, seq_ids=seq_ids, old_logp=old, ref_logp=ref
        ).loss.backward()
    fg.token_kl(logp, logp.detach() + 0.1).sum().backward()


def rewards() -> None:
    fg.group_advantages(torch.rand(37), torch.tensor([1, 5, 31]))
    boxes = torch.rand(33, 2) * 50
    a = torch.cat([boxes, boxes + 1 + torch.rand(33, 2) * 50], 1).requires_grad_()
    sizes = torch.tensor([1, 32, 0])
    values, offsets = fg.pairwise_box_iou(a, a.detach(), sizes, sizes, kind="giou")
    values.sum().backward()
    for method in ("optimal", "greedy"):
        fg.match_boxes(values.detach(), offsets, sizes, sizes, method=method)


CASES: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (shared_prefix, rows, projection, epilogue, losses, rewards)
}


def run(device: str, names: list[str]) -> None:
    with torch.device(device):
        for name in names:
            torch.manual_seed(0)
            CASES[name]()
            print(f"{name}: ran", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    run(args.device, args.names)
