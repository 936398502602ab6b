# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo bench [NAME ...]`: runs bench/bench_NAME.py of a source checkout, all by default."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from fastgrpo.errors import InputError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastgrpo bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all)")
    parser.add_argument("--folder", type=Path, default=_default_folder(), help="bench folder")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    args, passed_on = parser.parse_known_args(arguments)
    scripts = {path.stem.removeprefix("bench_"): path for path in args.folder.glob("bench_*.py")}
    if not scripts:
        raise InputError(f"no bench_*.py in {args.folder}: benchmarks need a source checkout")
    unknown = sorted(set(args.names) - set(scripts))
    if unknown:
        raise InputError(f"no benchmark {unknown[0]!r}; there are {', '.join(sorted(scripts))}")
    if args.list:
        print("\n".join(sorted(scripts)))
        return
    for name in args.names or sorted(scripts):
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, str(scripts[name]), *passed_on], check=True)


def _default_folder() -> Path:
    """bench/ next to the package in a checkout, else in the working folder."""
    beside = Path(__file__).resolve().parents[2] / "bench"
    return beside if beside.is_dir() else Path("bench")
