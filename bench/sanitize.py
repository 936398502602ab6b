"""Every kernel once, forward and backward, on shapes small enough for compute-sanitizer.

`python bench/sanitize.py [--device cpu]` runs them; `bench/sanitize.sh` runs them on a GPU under
memcheck and racecheck. Sizes straddle a tile or a warp, so that the masked edges are executed.
"""

import argparse
from collections.abc import Callable

import torch

import fastgrpo as fg
from fastgrpo.ops.gather_rows import gather_rows, row_index, sum_rows
from fastgrpo.ops.shared_prefix_attention import prefix_tables, shared_prefix_attention
from fastgrpo.packing.layout import GroupLayout


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def shared_prefix() -> None:
    segments = torch.tensor(GroupLayout([(131, [1, 0, 70]), (5, [129])]).segments)
    tables = prefix_tables(segments)
    half = torch.bfloat16 if tables.positions.is_cuda else torch.float32
    total = len(tables.positions)
    for head_dim in (64, 80, 128, 256):
        for options in ({}, {"window": 33, "softcap": 20.0}):
            q, k, v = (_leaf(total, heads, head_dim, dtype=half) for heads in (2, 1, 1))
            shared_prefix_attention(q, k, v, tables, **options).sum().backward()


def rows() -> None:
    index = row_index(torch.tensor([3, 0, 3, 3, 6, 1, 6]), 8)
    gather_rows(_leaf(8, 1025), index).sum().backward()
    sum_rows(_leaf(7, 1025), index).sum().backward()


def projection() -> None:
    hidden, weight = _leaf(67, 48), _leaf(1031, 48)
    targets = torch.arange(67) % 1031
    seq_ids = torch.arange(67) // 23
    obj = fg.Objective(loss_type="dapo", beta=0.04)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    out = fg.linear_logprob(hidden, weight, targets, outputs=("logp", "entropy"))
    (out.logp.sum() + out.entropy.sum()).backward()
    options = {"seq_ids": seq_ids, "ref_logp": out.logp.detach() + 0.1}
    fg.linear_grpo_loss(hidden, weight, targets, advantages, obj, **options).loss.backward()
    fg.linear_kl(hidden, weight, hidden.detach() + 0.1, weight.detach()).sum().backward()


def losses() -> None:
    logp = (-torch.rand(67)).requires_grad_()
    seq_ids = torch.arange(67) // 23
    advantages = torch.tensor([1.0, -1.0, 0.5])
    for loss_type in ("grpo", "dapo", "cispo"):
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
    f.__name__: f for f in (shared_prefix, rows, projection, losses, rewards)
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
