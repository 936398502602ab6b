# SPDX-License-Identifier: Apache-2.0
"""`fastgrpo report RUN`: a training run as one HTML page, and its curves as PNG."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastgrpo report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's output folder")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN/report)")
    args = parser.parse_args(arguments)
    from fastgrpo.report import write_report

    print(write_report(args.run, args.out).resolve())
