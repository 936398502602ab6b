# SPDX-License-Identifier: Apache-2.0
"""Which tiles the attention kernels should take on sm_90, by compiling and counting.

    python bench/occupancy.py [--read] [--measure] [--save]

For each kernel, candidate tile and shape: Triton's compiler gives registers and shared memory, so
the programs that fit a multiprocessor; the tables of the layout give the iterations of every
program; `clocks` gives the clocks of an iteration; and the programs are list-scheduled in launch
order. Nothing of it is measured. `--measure` (on a GPU) times the same lines, `--save` keeps them,
and a line with `measured_ms` is chosen by that instead of its prediction. The winners are the bf16
rows for a head dimension of 128 in `fastgrpo_kernels.shared_prefix_schedule`.

Letters: P prompt tokens, G completions of C tokens, H query heads, K key heads, D head dimension.
"""

import argparse
import heapq
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import RESULTS, environment
from fastgrpo_kernels import shared_prefix_schedule as schedule
from fastgrpo_kernels.shared_prefix_schedule import Tiles

from fastgrpo.ops.prefix_tables import PrefixTables, prefix_tables
from fastgrpo.packing.layout import GroupLayout

LINES = RESULTS / "attention_tiles_sm_90.json"
ARCH, D = "sm_90", 128
SHAPES = {  # P, G, C, H, K
    "3B P=1000 G=8 C=256": (1000, 8, 256, 16, 2),
    "7B P=1000 G=8 C=256": (1000, 8, 256, 28, 4),
    "3B P=300 G=8 C=1024": (300, 8, 1024, 16, 2),
    "7B P=3000 G=16 C=1024": (3000, 16, 1024, 28, 4),
}
CANDIDATES = {  # of those that compile without a spill by triton 3.6 and 3.9
    "fwd": ((128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2), (128, 32, 8, 3)),
    "dq": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
    "dkv": ((32, 128, 8, 2), (32, 64, 4, 1), (32, 32, 4, 2)),
}

# One H100 SXM.
PROCESSORS, CLOCK_MHZ = 132, 1755.0
REGISTERS, SHARED, WARPS = 65536, 227 * 1024, 64
CACHE = 40e6  # bytes that stay in the second-level cache from one kernel to the next
# Bytes a clock and multiprocessor, when all of them ask: 5.5 TB/s from that cache, 3.35 from memory
FROM_CACHE, FROM_MEMORY = (x * 1e6 / PROCESSORS / CLOCK_MHZ for x in (5.5, 3.35))
# Clocks of the parts of an iteration, by reading the machine code of the 8-warp kernels: issued
# instructions per logit and per row element of the accumulator, those of a loop whatever its tile
# (addresses, loads), and what it costs to wait for each product to leave the tensor cores.
PER_LOGIT = {"fwd": 9, "dq": 8, "dkv": 9}
PER_ACCUMULATED = {"fwd": 1, "dq": 0, "dkv": 0}
PER_LOOP = {"fwd": 64, "dq": 75, "dkv": 255}
WAIT = 100
START = 2000  # a program's launch, its first loads and its last store
INTERLEAVED = 0.8  # of a unit's rate, reached by programs that take turns on a multiprocessor


@dataclass
class Line:
    """One kernel with one tile at one shape. busy_ms: all that its programs do, evenly spread."""

    kernel: str
    tiles: list[int]  # query rows, keys, warps, stages
    shape: str
    registers: int
    shared: int
    per_processor: int
    programs: int
    waves: float
    iterations: int
    busy_ms: float
    predicted_ms: float
    measured_ms: float | None = None

    @property
    def ms(self) -> float:
        return self.predicted_ms if self.measured_ms is None else self.measured_ms

    @property
    def key(self) -> tuple:
        return self.kernel, *self.tiles, self.shape


def tables_of(shape: str) -> tuple[PrefixTables, int, int]:
    P, G, C, H, K = SHAPES[shape]
    segments = torch.tensor(GroupLayout([(P, [C] * G)]).segments)
    return prefix_tables(segments, heads=(H, K), processors=PROCESSORS), H, K


def programs(kernel: str, t: Tiles, shape: str) -> tuple[list[int], list[bool]]:
    """Iterations of each program in launch order, and whether it writes a float32 part."""
    tables, H, K = tables_of(shape)
    counts, parts = [], []
    if kernel != "dkv":
        for row, seg_start, seg_end, _, prefix_len in tables.blocks.tolist():
            for start in range(row, min(row + tables.block_rows, seg_end), t.m):
                keys = prefix_len + min(start + t.m, seg_end) - seg_start
                counts += [-(-keys // t.n)] * H
        return counts, [False] * len(counts)
    group = H // K
    for row, seg_end, _, query_end, share, shares, slot in tables.items.tolist():
        span = query_end - row
        cuts = [span * group * i // shares for i in (share, share + 1)]
        (h0, r0), (h1, r1) = (
            (at // span, at % span // tables.block_rows * tables.block_rows) for at in cuts
        )
        for start in range(row, min(row + tables.block_rows, seg_end), t.n):
            rows = [
                (row + r1 if h == h1 else query_end) - max(row + (r0 if h == h0 else 0), start)
                for h in range(h0, min(h1 + 1, group))
            ]
            counts += [sum(-(-max(0, n) // t.m) for n in rows)] * K
            parts += [slot >= 0] * K
    return counts, parts


def product_clocks(m: int, n: int, k: int, shared: bool) -> float:
    """Clocks of an (m, k) x (k, n) product of one program: 64 x n x 16 at a time, 2048 fused
    multiply-adds a clock, or its operands from shared memory at 128 bytes a clock."""
    return m / 64 * k / 16 * max(n / 2, 16 * shared + n / 4)


def clocks(kernel: str, t: Tiles, per_processor: int) -> float:
    """Clocks from one iteration of a program to its next: its parts one after the other, or what
    the busiest of tensor cores, issue slots and cache needs for all programs of a multiprocessor.
    """
    if kernel == "dkv":  # keys are the rows of these products
        first, second = product_clocks(t.n, t.m, D, True), product_clocks(t.n, D, t.m, False)
        products, count = 2 * first + 2 * second, 4
    else:
        first, second = product_clocks(t.m, t.n, D, True), product_clocks(t.m, D, t.n, False)
        products, count = (first + second, 2) if kernel == "fwd" else (2 * first + second, 3)
    issued = (PER_LOGIT[kernel] * t.m * t.n + PER_ACCUMULATED[kernel] * t.m * D) / 128
    issued += PER_LOOP[kernel] * t.warps / 4
    loaded = 2 * (t.m if kernel == "dkv" else t.n) * D * 2 / FROM_CACHE
    alone = products + issued + WAIT * count
    if per_processor == 1:
        return max(alone, loaded)
    return max(alone, per_processor * max(products, issued, loaded) / INTERLEAVED)


def makespan(costs: list[float], slots: int) -> float:
    """When the last of the programs ends if each goes, in order, to the slot that is free first."""
    free = [0.0] * slots
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def predict(kernel: str, t: Tiles, shape: str, registers: int, shared: int) -> Line:
    """The line of one kernel, tile and shape."""
    fit = min(REGISTERS // (registers * 32 * t.warps), SHARED // (shared + 1024), WARPS // t.warps)
    counts, parts = programs(kernel, t, shape)
    each = clocks(kernel, t, fit)
    part = 2 * t.n * D * 4
    costs = [START + n * each + p * part / FROM_CACHE for n, p in zip(counts, parts, strict=True)]
    slots = PROCESSORS * fit
    summed = 0.0
    if written := sum(parts) * part:  # the kernel that reads them all again
        rate = FROM_CACHE if written <= CACHE else FROM_MEMORY
        summed = START + written / PROCESSORS / rate
    return Line(
        kernel=kernel,
        tiles=list(t[:4]),
        shape=shape,
        registers=registers,
        shared=shared,
        per_processor=fit,
        programs=len(costs),
        waves=round(len(costs) / slots, 2),
        iterations=sum(counts),
        busy_ms=round((sum(costs) / slots + summed) / CLOCK_MHZ / 1e3, 4),
        predicted_ms=round((makespan(costs, slots) + summed) / CLOCK_MHZ / 1e3, 4),
    )


def compiled_lines() -> list[Line]:
    """Every candidate that compiles without a spill, at every shape."""
    from fastgrpo_kernels import aot
    from fastgrpo_kernels.shared_prefix_attention import aot_spec

    lines = []
    for kernel, candidates in CANDIDATES.items():
        for t in (Tiles(*candidate) for candidate in candidates):
            report = aot.report(aot_spec(kernel, ARCH, "bf16", D, 0, 0.0, t), ARCH)
            if report.problems:
                print(f"{kernel} {tuple(t)}: {'; '.join(report.problems)}")
                continue
            resources = (report.registers, report.shared_bytes)
            lines += [predict(kernel, t, shape, *resources) for shape in SHAPES]
    return lines


def best(lines: list[Line]) -> dict[str, Tiles]:
    """For each kernel the tile with the least product of times over the shapes."""
    found = {}
    for kernel in CANDIDATES:
        totals: dict[Tiles, float] = {}
        for line in lines:
            if line.kernel == kernel:
                t = Tiles(*line.tiles)
                totals[t] = totals.get(t, 0.0) + math.log(line.ms)
        found[kernel] = min(totals, key=totals.get)
    return found


@contextmanager
def launched_with(kernel: str, t: Tiles) -> Iterator[None]:
    """Inside, `kernel` is launched with `t` on sm_90 at a head dimension of 128."""
    name = f"{kernel} {ARCH}"
    before = schedule.TILES[name]
    schedule.TILES[name] = (*before[:2], t, *before[3:])
    try:
        yield
    finally:
        schedule.TILES[name] = before


def measure(line: Line) -> float:
    """Median milliseconds of the line's kernel on this GPU (dkv: with the sum of its parts)."""
    from common import median_ms
    from fastgrpo_kernels import shared_prefix_attention as kernels

    P, G, C, H, K = SHAPES[line.shape]
    segments = torch.tensor(GroupLayout([(P, [C] * G)]).segments)
    tables = prefix_tables(segments, "cuda", heads=(H, K))
    q, k, v, dout = (
        torch.randn(len(tables.positions), h, D, device="cuda").bfloat16() for h in (H, K, K, H)
    )
    numbers = (D**-0.5, 0, 0.0)
    out, lse = kernels.shared_prefix_attention_op(q, k, v, *tables[1:], *numbers)
    blocks = (tables.blocks, tables.block_rows)
    _, delta = kernels.dq_and_delta(q, k, v, out, dout, lse, *blocks, *numbers)
    runs = {
        "fwd": lambda: kernels.shared_prefix_attention_op(q, k, v, *tables[1:], *numbers),
        "dq": lambda: kernels.dq_and_delta(q, k, v, out, dout, lse, *blocks, *numbers),
        "dkv": lambda: kernels.dk_and_dv(q, k, v, dout, lse, delta, *tables[2:], *numbers),
    }
    with launched_with(line.kernel, Tiles(*line.tiles)):
        return median_ms({line.kernel: runs[line.kernel]}, "cuda")[line.kernel]


def read(path: Path) -> list[Line]:
    return [Line(**line) for line in json.loads(path.read_text())["lines"]]


def table(lines: list[Line]) -> str:
    """One row for each line; a star at the tiles that are launched."""
    rows = [
        "| kernel | m x n, warps, stages | registers | shape | programs | waves | iterations "
        "| busy ms | predicted ms | / busy | measured ms |",
        "|" + "---|" * 11,
    ]
    for line in lines:
        t = Tiles(*line.tiles)
        star = "*" * (schedule.compiled_tiles(line.kernel, ARCH, False, D, True) == t)
        cells = (
            *(line.kernel, f"{t.m} x {t.n}, {t.warps}, {t.stages}{star}", line.registers),
            *(line.shape, line.programs, line.waves, line.iterations, f"{line.busy_ms:.3f}"),
            *(f"{line.predicted_ms:.3f}", f"{line.predicted_ms / line.busy_ms:.2f}"),
            "" if line.measured_ms is None else f"{line.measured_ms:.3f}",
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=Path, default=LINES, help="the file that keeps the lines")
    parser.add_argument("--read", action="store_true", help="print the kept lines and stop")
    parser.add_argument("--save", action="store_true", help="keep the lines")
    parser.add_argument("--measure", action="store_true", help="time every line on this GPU")
    args = parser.parse_args()
    if args.read:
        print(table(read(args.lines)))
        return
    if args.measure and torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit(
            f"--measure: these tiles are for {ARCH}, not {torch.cuda.get_device_name()}"
        )
    lines = compiled_lines()
    known = {line.key: line.measured_ms for line in read(args.lines)} if args.lines.exists() else {}
    for line in lines:
        line.measured_ms = measure(line) if args.measure else known.get(line.key)
    print(table(lines))
    for kernel, t in best(lines).items():
        print(f"best {kernel}: {tuple(t)}")
    if args.save:
        device = "cuda" if args.measure else "cpu"
        found = {"environment": environment(device), "lines": [asdict(line) for line in lines]}
        args.lines.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
