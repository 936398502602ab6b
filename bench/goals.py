# SPDX-License-Identifier: Apache-2.0
"""What each goal on a GPU came to, as a Markdown table.

    python bench/goals.py [FOLDER] [--write docs/gpu.md]

FOLDER holds the result files of bench/gpu.sh; without one nothing counts as measured. `--write`
puts the table between the two markers of a document.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Figures = dict[tuple[str, str, str], dict]  # (op, shape, variant) -> a row of a result file
START, END = "<!-- goals -->", "<!-- end of goals -->"
HEAD_3B = "Qwen2.5-VL-3B N=16384 D=2048 V=151936"
HEAD_7B = "Qwen2.5-VL-7B N=16384 D=3584 V=152064"


@dataclass(frozen=True)
class Goal:
    """`read` gives the measured number out of the figures, or raises KeyError when it is not there;
    `least`: the bound is a lower one."""

    what: str
    bound: float
    read: Callable[[Figures], float]
    predicted: str = ""
    least: bool = False
    unit: str = ""

    def row(self, figures: Figures) -> str:
        try:
            value = self.read(figures)
        except KeyError:
            measured = ""
        else:
            met = value >= self.bound if self.least else value <= self.bound
            measured = f"{value:.3g}{self.unit}, {'met' if met else 'missed'}"
        bound = f"{'>=' if self.least else '<='} {self.bound:g}{self.unit}"
        return f"| {self.what} | {bound} | {self.predicted} | {measured} |"


def ms(op: str, shape: str, variant: str) -> Callable[[Figures], float]:
    return lambda figures: figures[op, shape, variant]["ms"]


def ratio(op: str, shape: str, above: str, below: str) -> Callable[[Figures], float]:
    return lambda figures: figures[op, shape, above]["ms"] / figures[op, shape, below]["ms"]


def against_gathered(shape: str) -> Callable[[Figures], float]:
    """Our kernel's time over that of the fastest variable-length call on gathered keys."""
    op = "shared_prefix_attention"

    def read(figures: Figures) -> float:
        rivals = [figures.get((op, shape, name)) for name in ("flash_attn", "torch_varlen")]
        times = [row["ms"] for row in rivals if row is not None]
        if not times:
            raise KeyError(shape)
        return figures[op, shape, "triton"]["ms"] / min(times)

    return read


def stage(name: str) -> Callable[[Figures], float]:
    return lambda figures: figures["stage", name, ""]["status"]


def trl_over_ours(wanted: str) -> Callable[[Figures], float]:
    """Of a benchmark with one shape on a GPU."""

    def read(figures: Figures) -> float:
        times = {variant: row["ms"] for (op, _, variant), row in figures.items() if op == wanted}
        return times["TRL"] / times["fastgrpo"]

    return read


GOALS = (
    Goal("GPU tests, exit status", 0, stage("tests")),
    Goal("memcheck and racecheck, exit status", 0, stage("sanitize")),
    Goal(
        "loss / three bare GEMMs, 3B head", 1.12,
        ratio("linear_grpo", HEAD_3B, "fastgrpo", "bare matmuls"), "1.13 (H200), 1.18 (H100)",
    ),
    Goal("loss, 3B head", 48, ms("linear_grpo", HEAD_3B, "fastgrpo"), "44 to 46 ms", unit=" ms"),
    Goal("loss, 7B head", 84, ms("linear_grpo", HEAD_7B, "fastgrpo"), unit=" ms"),
    Goal(
        "loss, frozen 3B head", 34, ms("linear_grpo", f"{HEAD_3B} frozen head", "fastgrpo"),
        unit=" ms",
    ),
    Goal(
        "loss, frozen 7B head", 57, ms("linear_grpo", f"{HEAD_7B} frozen head", "fastgrpo"),
        unit=" ms",
    ),
    Goal(
        "TRL's kernel and torch loss / ours, 3B head", 1.4,
        ratio("linear_grpo", HEAD_3B, "TRL kernel + torch loss", "fastgrpo"), "1.4 to 1.6",
        least=True,
    ),
    Goal(
        "Liger's fused linear GRPO / ours, 3B head", 3,
        ratio("linear_grpo", HEAD_3B, "Liger fused linear GRPO", "fastgrpo"), "6", least=True,
    ),
    Goal(
        "loss, peak beyond its inputs, 3B head", 3561,
        lambda figures: figures["linear_grpo", HEAD_3B, "fastgrpo"]["peak_mib"], unit=" MiB",
    ),
    Goal(
        "attention, forward and backward / gathered keys, 7B P=1000 G=8 C=256", 1,
        against_gathered("7B P=1000 G=8 C=256"), "0.8",
    ),
    Goal(
        "attention, forward and backward / gathered keys, 7B P=3000 G=16 C=1024", 1,
        against_gathered("7B P=3000 G=16 C=1024"), "0.7",
    ),
    Goal(
        "policy step of a 3B-wide model, TRL's padded / ours", 4, trl_over_ours("step"), least=True,
    ),
    Goal(
        "whole optimizer step of Qwen2.5-VL-3B, 4 x 8, 128 new tokens, TRL / ours", 3,
        trl_over_ours("whole_step"), "4", least=True,
    ),
)  # fmt: skip


def figures_of(folder: Path) -> Figures:
    """Every row that the folder's result files have of a GPU, and the stages as they last ended
    there."""
    found: Figures = {}
    for path in sorted(folder.glob("*.json")):
        for run in json.loads(path.read_text()).get("runs", ()):
            for row in run["rows"] if run["environment"]["cuda"] else ():
                found[row["op"], row["shape"], row["variant"]] = row
    stages = folder / "stages.jsonl"
    for line in stages.read_text().splitlines() if stages.exists() else ():
        row = json.loads(line)
        if row["device"] == "cuda":
            found["stage", row["stage"], ""] = row
    return found


def table(figures: Figures) -> str:
    rows = ["| goal | bound | predicted | measured |", "|---|---|---|---|"]
    return "\n".join([*rows, *(goal.row(figures) for goal in GOALS)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT")
    args = parser.parse_args()
    text = table(figures_of(args.folder) if args.folder else {})
    print(text)
    if args.write:
        before, rest = args.write.read_text().split(START)
        after = rest.split(END)[1]
        args.write.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
