# SPDX-License-Identifier: Apache-2.0
"""What a process of `bench_distributed.py` does: some optimizer steps, its seconds and memory."""

import json
import os
import statistics
import time
from pathlib import Path

import torch
from bench_whole_step import Shape, settings
from PIL import Image
from transformers import TrainerCallback
from trl import GRPOTrainer

from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.testing import cpu_processes
from fastgrpo.testing.memory import StepMemory
from fastgrpo.testing.trl import build_trainer

if not torch.cuda.is_available():
    torch.set_num_threads(1)
    cpu_processes.install()

TRAINERS = {"TRL": GRPOTrainer, "fastgrpo": FastGRPOTrainer}


def measure(kind: str, job: str, output: str) -> None:
    """Trains the job of that file and writes this process's row."""
    job = json.loads(Path(job).read_text())
    rows = [
        {"prompt": prompt, "images": [Image.open(path)]}
        for prompt, path in zip(job["prompts"], job["images"], strict=True)
    ]
    world, rank = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
    memory = StepMemory()
    watch = Stopwatch()
    trainer = build_trainer(
        TRAINERS[kind],
        Path(job["folder"]),
        Path(output, "run"),
        rows=rows,
        callbacks=[watch],
        use_cpu=False,
        max_steps=1 + job["rounds"],
        **settings(Shape(*job["shape"]), world),
    )
    trainer.train()
    figures = {"ms": statistics.median(watch.seconds[1:]) * 1e3, **memory.figures()}
    Path(output, f"rank{rank}.json").write_text(json.dumps(figures))
    trainer.accelerator.wait_for_everyone()


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step, rollout and scoring included."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.began)
