# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: interleaved medians, the result file, tables, work by formula.

A benchmark is a file `bench_<op>.py` with `rows(args) -> Iterable[Row]`; `main` only reports.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
_CODE = (":/", ":(top,exclude)bench/results")  # all of the repository but what is measured
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "scipy",
    "pycocotools",
    "lapx",
)


@dataclass
class Row:
    """One variant at one shape. ms: median wall or device time of the whole call.

    flops and bytes: work by formula (0 where it says nothing); error: against float64, what is
    measured named in `note`; extra: more figures under their own names.
    """

    op: str
    shape: str
    variant: str
    ms: float
    flops: float = 0.0
    bytes: float = 0.0
    peak_mib: float | None = None
    error: float | None = None
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def tflops(self) -> float:
        return self.flops / self.ms / 1e9

    @property
    def gbps(self) -> float:
        return self.bytes / self.ms / 1e6


def median_ms(
    variants: dict[str, Callable[[], object]],
    device: str = "cpu",
    repeats: int = 5,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each variant; on CPU the variants take turns, after one warm-up each
    (unless they are `warm`), so that a slow moment of the machine does not fall on one of them.

    `clock`, on CPU: `time.process_time` counts the processor's time of all threads, which waiting
    for other work on the machine does not lengthen."""
    if device == "cuda":
        return {name: _median_on_gpu(run, repeats) for name, run in variants.items()}
    for run in () if warm else variants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = clock()
            run()
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _median_on_gpu(run: Callable[[], object], repeats: int) -> float:
    """The median of at least max(repeats, 20) calls, and of 100 ms of them: do_bench alone takes
    as many as fit its milliseconds, two of a call of 45 ms."""
    from triton.testing import do_bench

    estimate = do_bench(run, warmup=1, rep=1)
    rep = max(100, int(max(repeats, 20) * estimate * 1.1))
    return do_bench(run, warmup=25, rep=rep, return_mode="median")


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """MiB allocated above the start by one call on CUDA; None elsewhere."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def matmul_flops(N: int, D: int, V: int, matmuls: int = 1) -> float:
    """Floating-point operations of `matmuls` products (N, D) x (D, V)."""
    return 2.0 * N * D * V * matmuls


def tensor_bytes(*tensors: torch.Tensor) -> float:
    """Bytes of the tensors: what reading or writing each once moves."""
    return float(sum(t.numel() * t.element_size() for t in tensors))


def importable(name: str) -> bool:
    """Whether a peer is installed and imports."""
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def environment(device: str = "cpu") -> dict[str, object]:
    """Hardware, versions, threads and commit, for the result file."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "hardware": hardware(device),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *_CODE)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def hardware(device: str = "cpu") -> str:
    """The name of the GPU, or of the processor and its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"


def _git(*args: str) -> str | None:
    command = ["git", "-C", str(RESULTS.parent), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def save(rows: Sequence[Row], device: str = "cpu", directory: Path = RESULTS) -> Path:
    """Write the rows into `<hardware>_<date>.json`, replacing earlier rows of the same op and shape
    there, and its Markdown table beside it."""
    slug = "".join(c if c.isalnum() else "-" for c in hardware(device)).strip("-").lower()
    while "--" in slug:
        slug = slug.replace("--", "-")
    path = directory / f"{slug}_{datetime.date.today().isoformat()}.json"
    directory.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text())["runs"] if path.exists() else []
    measured = {(row.op, row.shape) for row in rows}
    for run in kept:
        run["rows"] = [row for row in run["rows"] if (row["op"], row["shape"]) not in measured]
    kept = [run for run in kept if run["rows"]]
    for op in sorted({row.op for row in rows}):
        mine = [asdict(row) for row in rows if row.op == op]
        kept.append({"op": op, "environment": environment(device), "rows": mine})
    path.write_text(json.dumps({"runs": kept}, indent=1) + "\n")
    tables = [
        f"### {run['op']}\n\n{_where(run)}\n\n{table([Row(**row) for row in run['rows']])}"
        for run in kept
    ]
    path.with_suffix(".md").write_text("\n\n".join(tables) + "\n")
    return path


def _where(run: dict) -> str:
    e = run["environment"]
    torch_version = e["versions"]["torch"]
    return f"{e['hardware']}, {e['cpu_threads']} threads, torch {torch_version}, {e['commit']}"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; columns without a figure in any row are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "shape": lambda r: r.shape,
        "variant": lambda r: r.variant,
        "ms": lambda r: f"{r.ms:.3g}" if r.ms < 100 else f"{r.ms:.0f}",
        "TFLOP/s": lambda r: f"{r.tflops:.3g}" if r.flops else "",
        "GB/s": lambda r: f"{r.gbps:.3g}" if r.bytes else "",
        "peak MiB": lambda r: "" if r.peak_mib is None else f"{r.peak_mib:.0f}",
        "error": lambda r: "" if r.error is None else f"{r.error:.1e}",
    }
    for name in dict.fromkeys(name for r in rows for name in r.extra):
        columns[name] = lambda r, name=name: f"{r.extra[name]:.3g}" if name in r.extra else ""
    columns["note"] = lambda r: r.note
    cells = {name: [show(row) for row in rows] for name, show in columns.items()}
    used = [name for name, values in cells.items() if any(values)]
    lines = ["| " + " | ".join(used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(cells[name][i] for name in used) + " |" for i in range(len(rows))]
    return "\n".join(lines)


def arguments(**extra: dict) -> argparse.Namespace:
    """--device, --repeats, --small, --save, --results and flags of `extra` (name -> its kwargs)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes: does it run")
    parser.add_argument("--save", action="store_true", help="write the result file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    for name, kwargs in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **kwargs)
    return parser.parse_args()


def main(rows: Callable[[argparse.Namespace], Iterable[Row]], **extra: dict) -> None:
    """Run a benchmark as a script: print its table, and write the result file with --save. What
    yields its rows leaves those of a run that is cut."""
    args, result = arguments(**extra), []
    for row in rows(args):
        result.append(row)
        print(f"{row.shape}: {row.variant}: {row.ms:.3f} ms", flush=True)
        if args.save:
            save(result, args.device, args.results)
    print(table(result))
    if args.save:
        print(f"in {args.results}")


def measure(benchmark, run: Callable[[], object], **info: object) -> None:
    """A pytest-benchmark entry point: five rounds after a warm-up, `info` kept with the figures."""
    benchmark.extra_info.update(info)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
