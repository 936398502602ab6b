# SPDX-License-Identifier: Apache-2.0
"""The main job end to end, several seeds: held-out IoU before and after GRPO, and seconds.

    python bench/bench_demo.py --out runs/bench_demo --seeds 0 1 2 --save

Each seed draws its own data and runs `python -m fastgrpo.demo` in a process of its own. With
--save it writes bench/results/demo_<hardware>_<date>.json.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, environment, hardware

from fastgrpo.report.run import HELD_OUT_FILE


def measure(out: Path, seed: int) -> dict:
    """One run of the demo: its held-out figures, seconds of training and of everything."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "fastgrpo.demo", "--out", str(out), "--seed", str(seed)]
    subprocess.run(command, check=True)
    result = json.loads((out / HELD_OUT_FILE).read_text())
    before, after = result["before"], result["after"]
    return result | {
        "total_seconds": round(time.perf_counter() - start, 1),
        "sampled_ratio": round(after["sampled_iou"] / before["sampled_iou"], 3),
        "greedy_ratio": round(after["greedy_iou"] / before["greedy_iou"], 3),
    }


def save(runs: list[dict], directory: Path = RESULTS) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    path = directory / f"demo_{slug}_{datetime.date.today().isoformat()}.json"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1) + "\n")
    return path


def table(runs: list[dict]) -> str:
    lines = [
        "| seed | sampled IoU | greedy IoU | training | in all |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        before, after = run["before"], run["after"]
        lines.append(
            f"| {run['seed']} | {before['sampled_iou']:.3f} -> {after['sampled_iou']:.3f} "
            f"({run['sampled_ratio']:.2f}x) | {before['greedy_iou']:.3f} -> "
            f"{after['greedy_iou']:.3f} ({run['greedy_ratio']:.2f}x) | "
            f"{run['training_seconds']:.0f} s | {run['total_seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench_demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true", help="write bench/results")
    args = parser.parse_args()
    runs = [measure(args.out / f"seed{seed}", seed) for seed in args.seeds]
    print(table(runs))
    if args.save:
        print(save(runs))


if __name__ == "__main__":
    main()
