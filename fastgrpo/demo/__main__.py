# SPDX-License-Identifier: Apache-2.0
"""The main job from start to end: `python -m fastgrpo.demo --out runs/demo --seed 0`.

Draws the data, measures the warm start on held-out images, trains with GRPO exactly as `fastgrpo
train --config demo.yaml` does, measures again, and writes the report.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from fastgrpo.checkpoints.packed import unpack
from fastgrpo.cli import train
from fastgrpo.demo import data
from fastgrpo.demo.evaluate import HeldOut, evaluate, load
from fastgrpo.report import write_report
from fastgrpo.report.run import HELD_OUT_FILE

HERE = Path(__file__).parent
WARM_START = HERE / "warm_start"  # packed
CONFIG = HERE / "demo.yaml"
TRAIN_SAMPLES, HELD_OUT_SAMPLES = 3200, 512


def run(
    out: Path,
    seed: int = 0,
    *,
    train_samples: int = TRAIN_SAMPLES,
    held_out_samples: int = HELD_OUT_SAMPLES,
    overrides: tuple[str, ...] = (),
) -> dict:
    """Runs the whole job in `out`; returns the held-out figures before and after and the seconds of
    training.
    """
    # An earlier run's rows would otherwise be taken for this one's.
    shutil.rmtree(out / "completions", ignore_errors=True)
    folder = out / "data"
    train_file = data.write_split(folder, "train", train_samples, seed)
    held_out_file = data.write_split(folder, "heldout", held_out_samples, seed)
    policy = unpack(WARM_START, out / "warm_start")
    before = evaluate(*load(policy), held_out_file, seed)
    print(f"held-out before: {_figures(before)}")
    start = time.perf_counter()
    train.main(
        [
            *("--config", str(CONFIG)),
            *("--model_name_or_path", str(policy)),
            *("--data_file_paths", str(train_file)),
            *("--image_folders", str(folder / "images")),
            *("--output_dir", str(out)),
            *("--seed", str(seed)),
            *overrides,
        ]
    )
    seconds = time.perf_counter() - start
    after = evaluate(*load(out), held_out_file, seed)
    result = {
        "seed": seed,
        "before": asdict(before),
        "after": asdict(after),
        "training_seconds": round(seconds, 1),
    }
    (out / HELD_OUT_FILE).write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nreport: {write_report(out).resolve()}")
    print(f"held-out before: {_figures(before)}")
    print(f"held-out after:  {_figures(after)}")
    return result


def _figures(figures: HeldOut) -> str:
    return (
        f"IoU {figures.sampled_iou:.3f} sampled at temperature 1, {figures.greedy_iou:.3f} greedy, "
        f"over {figures.num_images} images"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Deprecation notices of the libraries below, which a reader of the demo can do nothing about.
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    # So small a policy gains little from threads, and stalls on them when the CPU is shared.
    torch.set_num_threads(1)
    run(args.out, args.seed)


if __name__ == "__main__":
    main()
