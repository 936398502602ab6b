# SPDX-License-Identifier: Apache-2.0
"""Roofline and accuracy plots of a result file, as PNG beside it.

python bench/plots.py bench/results/<hardware>_<date>.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import Row


def load(path: Path) -> list[Row]:
    """All rows of a result file."""
    runs = json.loads(path.read_text())["runs"]
    return [Row(**row) for run in runs for row in run["rows"]]


def roofline(rows: list[Row], target: Path) -> bool:
    """Achieved TFLOP/s against FLOPs per byte, under the measured roofs; False without them."""
    roofs = {row.variant: row for row in rows if row.op == "roofs"}
    points = [r for r in rows if r.flops and r.bytes and r.op != "roofs"]
    if not {"matmul", "copy"} <= set(roofs) or not points:
        return False
    peak, bandwidth = roofs["matmul"].tflops, roofs["copy"].gbps
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    intensities = sorted(r.flops / r.bytes for r in points)
    ridge = 1e3 * peak / bandwidth
    low, high = min(intensities[0], ridge) / 4, max(intensities[-1], ridge) * 4
    axes.plot([low, ridge, high], [low * bandwidth / 1e3, peak, peak], color="black")
    for op in dict.fromkeys(r.op for r in points):
        mine = [r for r in points if r.op == op]
        axes.scatter([r.flops / r.bytes for r in mine], [r.tflops for r in mine], label=op, s=25)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs per byte",
        ylabel="TFLOP/s",
        title=f"matmul {peak:.2g} TFLOP/s, copy {bandwidth:.3g} GB/s",
    )
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return True


def accuracy(rows: list[Row], target: Path) -> bool:
    """Error against float64 beside the time, a panel an op that has several variants."""
    stated: dict[str, list[Row]] = {}
    for row in rows:
        if row.error and row.op.startswith("linear"):
            stated.setdefault(f"{row.op}, {row.shape}", []).append(row)
    panels = {name: mine for name, mine in stated.items() if len(mine) > 1}
    if not panels:
        return False
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(7, 3.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for axes, (name, mine) in zip(grid.flat, panels.items(), strict=True):
        for row, marker in zip(mine, "osD^vP*X<>hp", strict=False):
            axes.scatter(row.ms, row.error, label=row.variant, marker=marker, s=45)
        axes.set(xlabel="ms", ylabel="error", title=name, xlim=(0, None), ylim=(0, None))
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return True


def main() -> None:
    """Draw both plots of one result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    rows = load(path)
    for name, draw in (("roofline", roofline), ("accuracy", accuracy)):
        target = path.with_name(f"{path.stem}_{name}.png")
        print(target if draw(rows, target) else f"{name}: nothing to draw in {path}")


if __name__ == "__main__":
    main()
