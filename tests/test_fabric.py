# SPDX-License-Identifier: Apache-2.0
"""The guide's loop for Lightning Fabric, as it is printed there, and GRPOStep in one process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgrpo as fg
from fastgrpo.testing import models as tm

lightning_fabric = pytest.importorskip("lightning_fabric")

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = 'devices=8, strategy="ddp"'
# AdamW's steps are the signs of gradients where these are rounding; SGD's are the gradients.
OPTIMIZER, COMPARABLE = "AdamW(model.parameters(), lr=1e-6)", "SGD(model.parameters(), lr=1.0)"
STEPS = 2


def steps_of(model) -> list[list[fg.Group]]:
    return [tm.synthetic_groups(model, seed=seed) for seed in range(STEPS)]


def documented_loop(model, processes: int) -> None:
    """Runs the page's block, each process with its share of every step's groups."""
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(fabric = .*?)```", page, re.S)
    assert OPTIONS in block and OPTIMIZER in block
    chosen = f'accelerator="cpu", devices={processes}'
    block = block.replace(OPTIONS, chosen + ', strategy="ddp"' * (processes > 1))
    block = block.replace(OPTIMIZER, COMPARABLE)
    names = dict(model=model, torch=torch, fg=fg, lightning_fabric=lightning_fabric)

    class Shares:
        def __iter__(self):
            rank = names["fabric"].global_rank
            return iter([groups[rank::processes] for groups in steps_of(model)])

    names["shares"] = Shares()
    exec(compile(block, "docs/scaling.md", "exec"), names)


def plain_loop(model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = fg.GRPOStep(model, fg.Objective(loss_type="dapo"))
    for groups in steps_of(model):
        step(groups)
        optimizer.step()
        optimizer.zero_grad()


def check_equal(processes: int) -> None:
    moved = []
    for loop in (lambda model: documented_loop(model, processes), plain_loop):
        model = tm.tiny_model("qwen2_5_vl")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loop(model)
        moved.append({n: p.detach() - before[n] for n, p in model.named_parameters()})
    assert max(float(change.abs().max()) for change in moved[1].values()) > 1e-2
    error, where = tm.grad_error(*moved)
    assert error <= 1e-4, where


def test_the_documented_loop_trains_as_plain_steps_do():
    check_equal(processes=1)


@pytest.mark.slow
def test_the_documented_loop_in_two_processes():
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=240, cwd="/"
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_equal(processes=2)
