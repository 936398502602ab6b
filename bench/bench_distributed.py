# SPDX-License-Identifier: Apache-2.0
"""Whole optimizer steps of TRL's trainer and the drop-in in several processes, by mode.

The first job of `bench_whole_step` with its settings: the same prompts whatever the number of
processes, all rows of a process one micro-batch. A row gives the slowest process: milliseconds of
a step after the first, which also runs the self-check, MiB its tensors hold between steps (weights,
gradients, optimizer, the generated batch), and the most memory it had. The same job in one process
comes first.
"""

import argparse
import json
import tempfile
from pathlib import Path

import common
from bench_whole_step import SHAPES, SMALL, Job, prepare

from fastgrpo.testing.launch import MODES, Launcher

NOTE = "one optimizer step, reference model, every parameter trained"
BUCKET = "; held counts DeepSpeed's bucket of 2 GB, of which little is ever written"


def rows(args: argparse.Namespace) -> list[common.Row]:
    name, shape = next(iter((SMALL if args.small else SHAPES).items()))
    size = "small" if args.small else "cuda" if args.device == "cuda" else "full"
    label = f"{name}, {shape.new_tokens} new, {size}"
    modes = [mode for mode in ("one", *MODES) if mode in args.modes.split(",")]
    counts = [int(count) for count in args.processes.split(",")]
    runs = [(m, n) for n in counts for m in modes if m != "one" and shape.prompts % n == 0]
    runs = [("one", 1)] * ("one" in modes) + runs
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(Path(scratch) / "model", shape, size, args.device)
        written = _written(job, Path(scratch), args.rounds)
        with Launcher(Path(__file__).parent / "distributed_job.py") as launch:
            for mode, processes in runs:
                for kind in args.trainers.split(","):
                    output = Path(scratch) / f"{mode}-{processes}-{kind}"
                    output.mkdir()
                    arguments = (kind, written, output)
                    launch(mode, "measure", *arguments, processes=processes, seconds=900)
                    found.append(_row(output, label, mode, processes, kind))
                    print(common.table(found[-1:]), flush=True)
    return found


def _written(job: Job, folder: Path, rounds: int) -> Path:
    """The job as a file and its pictures."""
    images = []
    for i, row in enumerate(job.rows):
        images.append(str(folder / f"{i}.png"))
        row["images"][0].save(images[-1])
    values = {"folder": str(job.folder), "prompts": [row["prompt"] for row in job.rows]}
    values |= {"images": images, "shape": job.shape, "rounds": rounds}
    path = folder / "job.json"
    path.write_text(json.dumps(values))
    return path


def _row(output: Path, shape: str, mode: str, processes: int, kind: str) -> common.Row:
    ranks = [json.loads(path.read_text()) for path in output.glob("rank*.json")]
    worst = {figure: max(rank[figure] for rank in ranks) for figure in ranks[0]}
    return common.Row(
        "distributed",
        shape,
        f"{kind}, {mode}, {processes} process{'es' if processes > 1 else ''}",
        worst.pop("ms"),
        peak_mib=worst.pop("peak MiB"),
        note=NOTE + (BUCKET if mode == "zero3" else ""),
        extra=worst,
    )


if __name__ == "__main__":
    common.main(
        rows,
        modes=dict(default=",".join(("one", *MODES)), help="which modes"),
        processes=dict(default="2", help="numbers of processes"),
        rounds=dict(type=int, default=2, help="steps of each trainer measured"),
        trainers=dict(default="TRL,fastgrpo", help="which trainers"),
    )
