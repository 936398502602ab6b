# SPDX-License-Identifier: Apache-2.0
"""Whole optimizer steps of TRL's trainer and the drop-in in several processes, by mode.

The job is that of `bench_whole_step`: the same prompts whatever the number of processes, one
micro-batch a group. A row gives the slowest process: milliseconds of a step after the first,
MiB its tensors hold between steps (weights, gradients, optimizer, the generated batch), and the
most memory it had. The same model alone is the row of one process.
"""

import argparse
import json
import tempfile
from pathlib import Path

import common
from bench_whole_step import SHAPES, SMALL, Job, prepare

from fastgrpo.testing.launch import MODES, Launcher


def rows(args: argparse.Namespace) -> list[common.Row]:
    name, shape = next(iter((SMALL if args.small else SHAPES).items()))
    size = "small" if args.small else "cuda" if args.device == "cuda" else "full"
    runs = [("one", 1)]
    runs += [(mode, count) for count in map(int, args.processes.split(",")) for mode in MODES]
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(Path(scratch) / "model", shape, size, args.device)
        written = _written(job, Path(scratch))
        with Launcher(Path(__file__).parent / "distributed_job.py") as launch:
            for mode, processes in runs:
                if shape.prompts % processes:
                    continue
                for kind in args.trainers.split(","):
                    output = Path(scratch) / f"{mode}-{processes}-{kind}"
                    output.mkdir()
                    arguments = (kind, written, output)
                    launch(mode, "measure", *arguments, processes=processes, seconds=900)
                    found.append(_row(output, name, job, mode, processes, kind))
                    print(common.table(found[-1:]), flush=True)
    return found


def _written(job: Job, folder: Path) -> Path:
    """The job as a file and its pictures."""
    images = []
    for i, row in enumerate(job.rows):
        images.append(str(folder / f"{i}.png"))
        row["images"][0].save(images[-1])
    values = {"folder": str(job.folder), "prompts": [row["prompt"] for row in job.rows]}
    values |= {"images": images, "generations": job.shape.generations}
    values |= {"new_tokens": job.shape.new_tokens}
    path = folder / "job.json"
    path.write_text(json.dumps(values))
    return path


def _row(output: Path, name: str, job, mode: str, processes: int, kind: str) -> common.Row:
    ranks = [json.loads(path.read_text()) for path in output.glob("rank*.json")]
    worst = {figure: max(rank[figure] for rank in ranks) for figure in ranks[0]}
    return common.Row(
        "distributed",
        f"{name}, {job.shape.new_tokens} new",
        f"{kind}, {mode}, {processes} process{'es' if processes > 1 else ''}",
        worst.pop("ms"),
        peak_mib=worst.pop("peak MiB"),
        note="reference model, AdamW, every parameter trained",
        extra=worst,
    )


if __name__ == "__main__":
    common.main(
        rows,
        processes=dict(default="2,4", help="numbers of processes"),
        trainers=dict(default="TRL,fastgrpo", help="which trainers"),
    )
